"""The controller."""

VERSION = "0.1.0"
