"""All that knows how our messages look in Redis: what they say, the decoder, publisher, depths, locks, dead letters."""
