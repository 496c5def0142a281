"""The callbacks of every run."""

# Key in the configuration → class in `callbacks`: configurable (`--nan_guard.check_every_n_steps=9`), and no YAML list
# drops them. ExactResume stands last, so that what it saves is the state after all other callbacks have acted.
STANDARD_CALLBACKS = {
    "throughput": "ThroughputMonitor",
    "compile": "CompileNetworks",
    "spike_statistics": "SpikeStatistics",
    "energy": "EnergyMeter",
    "robustness": "Robustness",
    "media": "MediaLogger",
    "export_artifact": "ExportArtifact",
    "disk_guard": "DiskGuard",
    "nan_guard": "NaNGuard",
    "exact_resume": "ExactResume",
}
