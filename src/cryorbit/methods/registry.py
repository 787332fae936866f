"""The methods by name; each is driven by ``training.loop.run`` and described on its page in docs/methods/."""

from importlib import import_module

from cryorbit.errors import ConfigError

METHODS: dict[str, tuple[str, str, str]] = {
    "abinitio": ("cryorbit.methods.marginal", "Marginal", "MarginalConfig"),
    "refine": ("cryorbit.methods.refinement", "Refinement", "RefinementConfig"),
    "align2d": ("cryorbit.methods.align2d", "Align2D", "Align2DConfig"),
    "averages": ("cryorbit.methods.class_averages", "ClassAverages", "ClassAveragesConfig"),
    "invariant": ("cryorbit.methods.invariant", "Invariant", "InvariantConfig"),
    "spatial-vae": ("cryorbit.methods.spatial_vae", "SpatialVAE", "SpatialVAEConfig"),
    "particle-pictures": ("cryorbit.methods.particle_pictures", "ParticlePictures", "ParticlePicturesConfig"),
    "variational": ("cryorbit.methods.variational", "Variational", "VariationalConfig"),
    "amortized": ("cryorbit.methods.amortized", "Amortized", "AmortizedConfig"),
    "ad": ("cryorbit.methods.amortized", "TablePoses", "TableConfig"),
    "tomo": ("cryorbit.methods.amortized", "Tomo", "DecoderConfig"),
}


def method(name: str) -> tuple[type, type]:
    """Class and config class of the method ``name``."""
    if name not in METHODS:
        raise ConfigError("CONF030", f"unknown method {name}", f"known methods: {', '.join(METHODS)}")
    module, cls, config = METHODS[name]
    loaded = import_module(module)
    return getattr(loaded, cls), getattr(loaded, config)
