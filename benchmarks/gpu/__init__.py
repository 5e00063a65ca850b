"""`make gpu-bench`: this library against fla-core on a GPU. __main__.py runs it, plan.py says what is measured and what
is aimed at, peers.py who runs, device.py how time is taken, report.py what is written."""
