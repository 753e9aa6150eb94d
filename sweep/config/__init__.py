"""The configuration: Hydra's tree, composed into frozen types, and the targets that recipes are meant for."""
