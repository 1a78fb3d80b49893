"""``leoflow lite``: the whole system on one machine, started by one command and stopped with it."""
