"""What a system on one machine stands on: a private redis-server and a supervisor of child processes."""
