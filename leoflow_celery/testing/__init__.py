"""Doubles for tests of code that uses leoflow_celery: an executor and a client that follow a script."""
