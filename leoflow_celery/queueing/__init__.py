"""How our messages look in Redis: the decoder of what comes in, and the dead letters of what was refused."""
