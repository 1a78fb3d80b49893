"""Images that tests build where no registry can be reached."""
