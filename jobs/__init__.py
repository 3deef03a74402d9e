"""The programs, one file a stage. Here stands what Ray and transformers read from the environment once."""

import os

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Data starts 32 processes to read the footers of Parquet files, of which there are a few hundred here.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # What a reader of a job's output can do nothing about.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started|ServeController.graceful_shutdown failed",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""For this process, where nobody set them, and for all its workers."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
