"""What the system is about, without any server: requests, states, reasons, attempts, routing and decisions.

Everything here is a frozen value or a pure function. Nothing here opens a socket, a file or a transaction.
"""
