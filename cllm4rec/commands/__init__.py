"""The commands of `cllm4rec`, one file each: what it is for, its flags, and what it does with a config."""
