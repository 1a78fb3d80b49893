"""What a run was, for people: one page (``page``) and a chart in the terminal (``gantt``) of the same ``data``."""
