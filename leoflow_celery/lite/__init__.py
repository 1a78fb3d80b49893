"""A system on one machine, and a small scheduler over the public client: DAG file, plan, driver, embedded servers.

The core does not import it.
"""
