"""The program that serves bundles over HTTP: verify, load, score, rank, explain. It never imports torch."""
