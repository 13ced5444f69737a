"""The networks: shapes, how they start, what they use, and that they export as they are."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from ul_train import networks
from ul_train.networks import DecoderUViT, Encoder, LatentViT

BATCH = 3


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with weights as of a trained one: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def encoder(channels: int = 1, patch: int = 2, widths=(16, 24)) -> Encoder:
    torch.manual_seed(0)
    return Encoder(channels, 4, patch, widths, [1] * len(widths))


def vit(widths=(32,), num_blocks=(2,), num_classes: int = 0, size: int = 4, dropout: float = 0.0) -> LatentViT:
    torch.manual_seed(0)
    return LatentViT(4, size, widths, num_blocks, 16, num_classes, dropout)


def decoder(channels: int = 1, patch: int = 2, widths=(16,), num_blocks=(1,), size: int = 16) -> DecoderUViT:
    torch.manual_seed(0)
    return DecoderUViT(channels, size, 4, patch, widths, num_blocks, width=32, num_middle_blocks=1, head_dim=16)


def decoder_inputs(network: DecoderUViT, channels: int = 1, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    grid = network.latent_size
    return torch.randn(BATCH, channels, size, size), torch.linspace(-9, 9, BATCH), torch.randn(BATCH, 4, grid, grid)


def vit_inputs(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(BATCH, 4, size, size), torch.linspace(-10, 5, BATCH), torch.tensor([0, 2, 3])


ENCODERS = [(1, 1, (16,), 1), (1, 2, (16, 24), 4), (3, 2, (16, 16, 32), 8), (3, 4, (24, 40), 8)]
VITS = [((32,), (2,)), ((32,), (1,)), ((32, 48), (3, 1)), ((16, 32, 32), (1, 2, 1))]
DECODERS = [(1, 2, (16,), (1,)), (3, 2, (16, 24), (2, 1)), (3, 1, (16, 16, 16), (1, 1, 2)), (1, 4, (40,), (3,))]


@pytest.mark.parametrize(("channels", "patch", "widths", "downsampling"), ENCODERS)
def test_encoder_makes_latents_of_the_image_size_over_the_downsampling(channels, patch, widths, downsampling):
    z_clean = encoder(channels, patch, widths)(torch.randn(BATCH, channels, 16, 16))
    assert z_clean.shape == (BATCH, 4, 16 // downsampling, 16 // downsampling)


@pytest.mark.parametrize("size", [8, 16, 24, 48])
def test_encoder_takes_any_square_size_that_its_downsampling_divides(size):
    assert encoder()(torch.randn(1, 1, size, size)).shape == (1, 4, size // 4, size // 4)


@pytest.mark.parametrize(("widths", "num_blocks"), VITS)
@pytest.mark.parametrize("size", [4, 12])
def test_vit_predicts_v_in_the_shape_of_the_latent(widths, num_blocks, size):
    network = randomised(vit(widths, num_blocks, size=size))
    z_t, logsnr, _ = vit_inputs(size)
    assert network(z_t, logsnr).shape == z_t.shape


@pytest.mark.parametrize(("channels", "patch", "widths", "num_blocks"), DECODERS)
def test_decoder_predicts_v_in_the_shape_of_the_image(channels, patch, widths, num_blocks):
    network = randomised(decoder(channels, patch, widths, num_blocks))
    inputs = decoder_inputs(network, channels)
    assert network(*inputs).shape == inputs[0].shape


@pytest.mark.parametrize(("widths", "num_blocks"), VITS)
def test_vit_levels_hold_all_the_blocks_they_were_given(widths, num_blocks):
    network = vit(widths, num_blocks)
    held = [len(down.blocks) + len(up.blocks) for down, up in zip(network.down, network.up, strict=True)]
    assert (*held, len(network.middle.blocks)) == num_blocks


@pytest.mark.parametrize(("widths", "num_blocks"), VITS)
def test_vit_starts_at_v_zero_the_exact_denoiser_of_unit_gaussian_latents(widths, num_blocks):
    z_t, logsnr, label = vit_inputs()
    assert torch.count_nonzero(vit(widths, num_blocks, num_classes=3)(z_t, logsnr, label)) == 0


@pytest.mark.parametrize(("channels", "patch", "widths", "num_blocks"), DECODERS)
def test_decoder_starts_at_v_zero(channels, patch, widths, num_blocks):
    network = decoder(channels, patch, widths, num_blocks)
    assert torch.count_nonzero(network(*decoder_inputs(network, channels))) == 0


@pytest.mark.parametrize(("channels", "patch", "widths", "downsampling"), ENCODERS)
def test_latents_start_near_unit_scale(channels, patch, widths, downsampling):
    pictures = torch.nn.functional.interpolate(torch.randn(64, channels, 4, 4), scale_factor=8).clamp(-1, 1)
    assert 0.4 < encoder(channels, patch, widths)(pictures).std().item() < 2.0


def test_latents_start_near_unit_scale_whatever_the_contrast_of_the_images():
    pictures = torch.randn(64, 1, 16, 16)
    stds = [encoder()(scale * pictures).std().item() for scale in (0.1, 1.0)]
    assert stds[0] == pytest.approx(stds[1], rel=0.5)


def test_encoder_is_deterministic():
    network, x = encoder().train(), torch.randn(BATCH, 1, 16, 16)
    assert torch.equal(network(x), network(x))


def test_labels_change_the_prediction_and_no_label_is_one_of_them():
    network = randomised(vit(num_classes=3))
    z_t, logsnr, _ = vit_inputs()
    outputs = [network(z_t, logsnr, torch.full((BATCH,), label)) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3


def test_a_label_beyond_no_label_is_an_error():
    with pytest.raises(IndexError):
        vit(num_classes=3)(*vit_inputs()[:2], torch.tensor([0, 1, 4]))


def test_a_vit_without_classes_ignores_the_label():
    network = randomised(vit())
    z_t, logsnr, label = vit_inputs()
    assert torch.equal(network(z_t, logsnr, label), network(z_t, logsnr))


def test_every_input_of_the_decoder_matters():
    network = randomised(decoder())
    inputs = decoder_inputs(network)
    output = network(*inputs)
    for i in range(3):
        changed = [value + 0.5 if k == i else value for k, value in enumerate(inputs)]
        assert (network(*changed) - output).abs().max() > 1e-3


def test_logsnr_matters_to_the_vit_at_both_ends():
    network = randomised(vit())
    z_t = torch.randn(2, 4, 4, 4)
    for low, high in ((-10.0, -9.0), (4.0, 5.0)):
        change = network(z_t, torch.full((2,), low)) - network(z_t, torch.full((2,), high))
        assert change.abs().max() > 1e-3


def test_z_0_reaches_the_part_of_the_image_that_it_came_from():
    """One pixel of z_0 changed: the decoder's answer changes most nearby, so rows and columns are not mixed up."""
    network = randomised(decoder())
    x_t, logsnr, z_0 = decoder_inputs(network)
    with torch.no_grad():
        for block in network.middle.blocks:  # attention spreads over the whole image
            block.attention.out.weight.zero_()
        moved = z_0.clone()
        moved[:, :, 0, 3] += 1.0
        change = (network(x_t, logsnr, moved) - network(x_t, logsnr, z_0)).abs().sum(1)
    corners = {(row, column): float(change[:, 12 * row : 12 * row + 4, 12 * column : 12 * column + 4].mean())
               for row in (0, 1) for column in (0, 1)}  # fmt: skip
    assert max(corners, key=corners.get) == (0, 1)
    assert corners[0, 1] > 3 * corners[1, 0]


NETWORKS = {
    "encoder": (lambda: encoder(3), lambda network: (torch.randn(BATCH, 3, 16, 16),)),
    "prior": (lambda: vit(), lambda network: vit_inputs()[:2]),
    "base": (lambda: vit((32, 48), (2, 1), num_classes=3), lambda network: vit_inputs()),
    "decoder": (lambda: decoder(1, 2, (16, 24), (1, 1)), decoder_inputs),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


@each_network
def test_an_example_does_not_depend_on_the_others_of_its_batch(name):
    make, inputs_of = NETWORKS[name]
    network = randomised(make())
    inputs = inputs_of(network)
    whole = network(*inputs)
    for i in range(BATCH):
        alone = network(*(value[i : i + 1] for value in inputs))
        assert torch.allclose(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    backwards = network(*(value.flip(0) for value in inputs))
    assert torch.allclose(whole.flip(0), backwards, rtol=1e-4, atol=1e-5)


@each_network
def test_every_weight_learns(name):
    make, inputs_of = NETWORKS[name]
    network = randomised(make()).train()
    network(*inputs_of(network)).square().sum().backward()
    idle = [key for key, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [key for key in idle if key != "label_embedding.weight"] == []


@each_network
def test_a_network_exports_as_it_is_with_any_batch_size(name):
    make, inputs_of = NETWORKS[name]
    network = randomised(make())
    inputs, batch = inputs_of(network), Dim("b", min=1, max=64)
    program = export(network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    for rows in (1, BATCH, 7):
        given = [value.repeat_interleave(3, 0)[:rows] for value in inputs]
        assert torch.allclose(program.module()(*given), network(*given), rtol=1e-4, atol=1e-5)


@each_network
def test_the_bf16_path_of_a_network_agrees_with_float32(name):
    make, inputs_of = NETWORKS[name]
    network = randomised(make())
    inputs = inputs_of(network)
    exact = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(*inputs).float()
    assert ((rough - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize(("make", "inputs_of"), [NETWORKS["base"], NETWORKS["decoder"]])
def test_the_carry_alone_scales_each_channel_of_the_noisy_input_by_a_function_of_logsnr(make, inputs_of):
    network = make().eval()
    noisy, logsnr, *others = inputs_of(network)
    with torch.no_grad():
        torch.nn.init.normal_(network.carry.linear.weight)
    factor = network(noisy, logsnr, *others) / noisy  # b c h w
    assert factor.std(dim=(2, 3)).max() < 1e-5
    assert factor[:, :, 0, 0].std(dim=0).min() > 0.01


def test_dropout_acts_in_training_only():
    network = randomised(vit(dropout=0.5))
    z_t, logsnr, _ = vit_inputs()
    assert torch.equal(network(z_t, logsnr), network(z_t, logsnr))
    network.train()
    assert not torch.equal(network(z_t, logsnr), network(z_t, logsnr))


def test_merging_tokens_is_pixel_unshuffle_and_splitting_them_is_its_inverse():
    h = torch.randn(2, 8 * 8, 3)
    merged = networks.merge_tokens(h, 8)
    assert torch.equal(merged, networks.to_tokens(nn.functional.pixel_unshuffle(networks.to_grid(h, 8), 2)))
    assert torch.equal(networks.split_tokens(merged, 4), h)


@pytest.mark.parametrize(
    ("layer", "shapes", "fused"),
    [
        (networks.attention, [(2, 3, 5, 16)] * 3, "scaled_dot_product"),
        (networks.rms_norm, [(2, 3, 5, 16), (16,)], "rms_norm"),
    ],
)
def test_what_is_written_out_for_export_is_the_operator_of_torch(layer, shapes, fused):
    class Layer(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return layer(*inputs)

    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    program = export(Layer(), inputs)
    assert not any(fused in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))
