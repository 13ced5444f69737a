"""A run in the words of the bundle format: formats, schedules, classes, sampling defaults and graph interfaces."""

from ul_runtime import __version__
from ul_runtime.image_conversion import rgb
from ul_runtime.manifest import (
    GRAPH_NAMES,
    BundleInfo,
    DecoderDefaults,
    Defaults,
    Graph,
    GraphName,
    ImageFormat,
    LatentFormat,
    LogsnrRange,
    PriorDefaults,
    Provenance,
    TensorFormat,
    interface,
)
from ul_train.config import Config, config_hash

NETWORK_OF_GRAPH = {"encoder": "encoder", "prior_step": "prior", "decoder_step": "decoder"}


def _tensors(shapes: dict[str, tuple[int | str, ...]]) -> tuple[TensorFormat, ...]:
    return tuple(
        TensorFormat(name=name, dtype="int64" if name == "label" else "float32", shape=shape)
        for name, shape in shapes.items()
    )


def _graph(name: GraphName, image: ImageFormat, latent: LatentFormat, opset: int) -> Graph:
    inputs, outputs = interface(name, image, latent)
    return Graph(
        file=f"{name}.onnx",
        weights=f"{NETWORK_OF_GRAPH[name]}.safetensors",
        precision="fp32",
        opset=opset,
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
    )


def describe(
    config: Config,
    class_names: tuple[str, ...],
    run_id: str,
    data_fingerprint: str,
    step: int,
    opset: int,
    encoder_sha256: str | None = None,
) -> BundleInfo:
    """The manifest of a bundle of this run, without hashes, quality and parity."""
    objective, sampling = config.make_objective(), config.sampling
    image = ImageFormat(
        channels=config.image.channels,
        size=config.image.size,
        background="#{:02x}{:02x}{:02x}".format(*rgb(config.image.background)),
        fit=config.image.fit,
    )
    latent = LatentFormat(channels=config.latent_channels, size=config.latent_size)
    z_min, z_max = objective.schedule_z.ends
    x_min, x_max = objective.schedule_x.ends
    return BundleInfo(
        name=config.name,
        image=image,
        latent=latent,
        classes=class_names,
        logsnr_z=LogsnrRange(min=z_min, max=z_max),
        logsnr_x=LogsnrRange(min=x_min, max=x_max),
        defaults=Defaults(
            prior=PriorDefaults(
                sampler=sampling.sampler,
                grid=sampling.grid,
                num_steps=sampling.steps,
                guidance=sampling.guidance if class_names else 1.0,
                guidance_interval=sampling.guidance_interval,
                guidance_rescale=sampling.guidance_rescale,
            ),
            decoder=DecoderDefaults(
                sampler=sampling.decoder_sampler, grid=sampling.decoder_grid, num_steps=sampling.decoder_steps
            ),
        ),
        graphs={name: _graph(name, image, latent, opset) for name in GRAPH_NAMES},
        provenance=Provenance(
            run_id=run_id,
            config_sha256=config_hash(config),
            data_fingerprint=data_fingerprint,
            step=step,
            weights="ema",
            code_version=__version__,
            encoder_sha256=encoder_sha256,
        ),
        recipe=config.model_dump(mode="json", exclude_none=True),
    )
