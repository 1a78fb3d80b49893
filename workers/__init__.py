"""The workers by their names in a checkout and in the images; what is installed is ``leoflow_celery.workers``."""
