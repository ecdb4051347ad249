"""What is kept on disk: whole files, artifacts, an unfinished run, a journal, JSON."""
