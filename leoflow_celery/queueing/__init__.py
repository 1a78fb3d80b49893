"""All that knows how our messages look in Redis: what they say, how they are sent, how deep the queues are, locks."""
