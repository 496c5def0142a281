"""A package, since torch-fidelity installs one of the same name, which processes of tests would find instead."""
