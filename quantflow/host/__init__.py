"""The machine: its cores and memory, its versions, its worker processes."""
