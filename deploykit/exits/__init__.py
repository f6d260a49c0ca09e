"""Early exits: classifiers behind the stages of a network, what trains them, and when a sample may leave by one."""
