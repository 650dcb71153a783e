"""What runs on the device: serve, smoke, bench, verify, doctor, info. Standard library only, Python 3.10 or newer.

Copied into each bundle, whose JSON files are the whole contract with the host: nothing here imports anything outside
this package.
"""
