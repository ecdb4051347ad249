"""One file per task of the command line: `task=NAME`.

run          the main job, and the search for the fastest model within limits
plan         what would happen to every layer
artifact     evaluate, benchmark, inspect, report: what an artifact is asked
compare      two artifacts
sensitivity  what int8 costs each layer
doctor       this machine
selftest     every kernel on this machine
schema       the JSON schema of recipes
"""
