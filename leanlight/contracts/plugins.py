"""How installed packages add methods: known to the registry, and to what decides which packages may be imported."""

METHODS_GROUP = "leanlight.methods"  # the entry-point group in which a package names its `MethodInfo`
