"""What a system on one machine stands on: a private Valkey or Redis server and a supervisor of child processes."""
