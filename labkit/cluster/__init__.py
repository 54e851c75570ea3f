"""Where things run: Ray on this machine, and later Kubernetes."""
