"""Distilled artifacts on disk: a folder of safetensors with `accel.json`, verified whenever it is read."""

from accel.artifacts.checks import Check, non_finite
from accel.artifacts.digest import (
    config_digest,
    describe_base,
    file_digest,
    json_digest,
    stable_settings,
    tokenizer_digest,
)
from accel.artifacts.manifest import FORMAT_VERSION, KINDS, MANIFEST_NAME, BaseModel, FileEntry, Manifest
from accel.artifacts.resolve import Found, cache_folder, default_roots, find_artifact, list_artifacts, resolve
from accel.artifacts.store import Artifact, check_base, open_artifact, read_manifest, save, saved_files, update, verify

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "MANIFEST_NAME",
    "Artifact",
    "BaseModel",
    "Check",
    "FileEntry",
    "Found",
    "Manifest",
    "cache_folder",
    "check_base",
    "config_digest",
    "default_roots",
    "describe_base",
    "file_digest",
    "find_artifact",
    "json_digest",
    "list_artifacts",
    "non_finite",
    "open_artifact",
    "read_manifest",
    "resolve",
    "save",
    "saved_files",
    "stable_settings",
    "tokenizer_digest",
    "update",
    "verify",
]
