"""Where a prefix acts: attention modules, their caches, masks and positions."""
