"""What tests share: waiting, ports, processes, real servers, leak checks. Nothing here is a test."""
