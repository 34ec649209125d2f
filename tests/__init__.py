"""Tests. A regular package, so that no other installed ``tests`` can shadow the helpers in here."""
