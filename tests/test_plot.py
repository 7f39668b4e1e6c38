"The `plot` floor: every container, dtype and layout; arguments that reach matplotlib; grids of every size; errors."
import inspect, subprocess, sys, warnings
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from matplotlib.colors import to_rgba
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from miniai.plot import (RED, _grid_shape, as_array, as_image, get_grid, plot_confusion, plot_curves, show_image, show_images,
                         show_predictions, smooth, subplots)

H, W = 6, 9
plt.rcParams['figure.dpi'] = 40  # fewer pixels to paint


@pytest.fixture(autouse=True)
def no_figure_left_no_warning():
    "Each test draws what it made last, with warnings as errors, and leaves no figure behind."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield
        if plt.get_fignums(): plt.gcf().canvas.draw()
    plt.close('all')


def pixels(c=None, dtype='uint8'):
    "An image that has a different number in each place: (H, W), or (H, W, c)."
    a = np.arange(H*W*(c or 1)).reshape((H, W, c) if c else (H, W))
    if dtype == 'bool': return a % 3 == 0
    return (a / a.max()).astype(dtype) if dtype.startswith('float') else a.astype(dtype)

def shown(ax): return ax.images[0].get_array()


# Layouts × containers × dtypes

LAYOUTS = {  # how the image is stored -> how many channels, and the way there from (H, W) or (H, W, c)
    'hw':   (None, lambda a: a),          'hw1':  (1, lambda a: a),
    '1hw':  (1, lambda a: np.moveaxis(a, -1, 0)), '11hw': (1, lambda a: np.moveaxis(a, -1, 0)[None]),
    'hw3':  (3, lambda a: a),             'hw4':  (4, lambda a: a),
    '3hw':  (3, lambda a: np.moveaxis(a, -1, 0)), '4hw':  (4, lambda a: np.moveaxis(a, -1, 0)),
    '13hw': (3, lambda a: np.moveaxis(a, -1, 0)[None]), '1hw3': (3, lambda a: a[None]),
}
KINDS = {'array': lambda a: a, 'tensor': torch.tensor, 'view': lambda a: torch.tensor(a).transpose(-1, -2).contiguous().transpose(-1, -2),
         'list': lambda a: a.tolist()}

DTYPES = ['bool', 'uint8', 'int16', 'int64', 'float16', 'float32', 'float64']

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_shown_pixels_are_the_input(layout, kind):
    c, store = LAYOUTS[layout]
    for dtype in DTYPES:
        a = pixels(c, dtype)
        got = as_image(KINDS[kind](store(a)))
        assert_array_equal(got, a[..., 0] if c == 1 else a, err_msg=dtype)
        assert_array_equal(as_image(got), got, err_msg=dtype)       # an image that was made ready stays as it is

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('grad', [False, True])
def test_tensor_formats(dtype, grad):
    x = torch.rand(3, H, W).to(dtype)
    want = x.double().permute(1, 2, 0).numpy()                      # every one of these formats fits into float64
    assert_array_equal(as_image(x.clone().requires_grad_()*1 if grad else x), want)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda():
    x = torch.rand(3, H, W, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    assert_array_equal(shown(show_image(x)), x.detach().float().cpu().permute(1, 2, 0))

RGB, GREY = Image.fromarray(pixels(3)), Image.fromarray(pixels())

@pytest.mark.parametrize('mode', ['1', 'L', 'I', 'F', 'I;16'])
def test_pil_grey(mode):
    im = GREY.convert('I').convert(mode) if mode == 'I;16' else GREY.convert(mode)
    assert as_image(im).shape == (H, W)
    assert_array_equal(as_image(im), np.asarray(im))

@pytest.mark.parametrize('mode, like, tol', [('RGB', 'RGB', 0), ('RGBA', 'RGBA', 0), ('LA', 'RGBA', 0), ('CMYK', 'RGB', 0),
                                             ('HSV', 'RGB', 9), ('YCbCr', 'RGB', 4)])
def test_pil_colour(mode, like, tol):
    src = GREY if mode == 'LA' else RGB
    assert_allclose(as_image(src.convert(mode)).astype(int), np.asarray(src.convert(like)).astype(int), atol=tol)

def test_pil_palette_shows_colours_not_indices():
    im = Image.new('RGB', (W, H), (10, 200, 30)).convert('P', palette=Image.Palette.ADAPTIVE)
    assert_array_equal(as_image(im)[0, 0], (10, 200, 30))
    im.info['transparency'] = 0
    assert as_image(im).shape == (H, W, 4)

def test_containers_decide_what_is_ambiguous():
    "With 3 or 4 at both ends a tensor has its channels first, an array last."
    a = np.arange(3*5*4).reshape(3, 5, 4)
    assert as_image(a).shape == (3, 5, 4)                    # RGB and opacity, 3 × 5
    assert as_image(torch.tensor(a)).shape == (5, 4, 3)      # RGB, 5 × 4
    assert as_image(torch.ones(1, 5, 3)).shape == (5, 3)
    assert as_image(np.ones((1, 5, 3))).shape == (1, 5, 3)


# The range of colours

@pytest.mark.parametrize('lo, hi, low, high', [(0, 1, 0, 1), (.2, .9, 0, 1), (-1, 1, -1, 1), (-2, .5, -2, 1), (.5, 3, 0, 3),
                                               (0, 255, 0, 255)])
def test_float_colours_are_widened_just_as_far_as_needed(lo, hi, low, high):
    a = np.linspace(lo, hi, H*W*3).reshape(H, W, 3)
    assert_allclose(as_image(a), (a - low) / (high - low), atol=1e-12)

def test_whole_numbers_beyond_a_byte():
    a = pixels(3, 'int64')*1000 - 500
    assert_allclose(as_image(a), (a + 500) / (a.max() + 500))
    assert as_image(pixels(3, 'int64')).dtype == np.uint8
    assert_array_equal(as_image(-pixels(3, 'int8') % 5), -pixels(3, 'int8') % 5)

def test_nan_and_infinity_spoil_only_their_own_pixels():
    a = pixels(3, 'float64')*4
    a[0, 0], a[1, 1], a[2, 2] = np.nan, np.inf, -np.inf
    want = a / 4
    want[[0, 1, 2], [0, 1, 2]] = 0
    assert_allclose(as_image(a), want)
    show_image(a)
    show_image(a[..., 0])

def test_opacity_is_widened_on_its_own():
    a = pixels(4, 'float64')*2 - 1
    a[..., 3] = .25
    assert_array_equal(as_image(a)[..., 3], .25)
    assert as_image(a)[..., :3].min() == 0

def test_the_image_is_a_copy():
    "A buffer that is used again must not change a picture that was shown."
    a = pixels(dtype='float32')
    ax = show_image(a)
    a[:] = 7
    assert_array_equal(shown(ax), pixels(dtype='float32'))


# What cannot be shown

@pytest.mark.parametrize('im, words', [
    (torch.zeros(64, 3, 28, 28), r'got shape \(64, 3, 28, 28\). A batch\? Did you mean show_images\?'),
    (np.zeros((8, 28, 28)),      'A batch'),
    (np.zeros((2, 28, 28)),      'A batch'),
    (torch.zeros(784),           r'Did you mean im.reshape\(28, 28\)\?'),
    (torch.zeros(10),            r'Did you mean im.reshape\(h, w\)\?'),
    (np.zeros((0, 28)),          'no pixels'), (torch.zeros(3, 0, 28), 'no pixels')])
def test_bad_shapes(im, words):
    with pytest.raises(ValueError, match=words): show_image(im)
    assert not plt.get_fignums()                        # nothing half-done on the screen

@pytest.mark.parametrize('im, words', [('cat.png', 'str'), (None, 'NoneType'), (np.zeros((4, 4), complex), 'complex128')])
def test_bad_types(im, words):
    with pytest.raises(TypeError, match=words): as_image(im)


# One image

def test_show_image_arguments_reach_matplotlib():
    ax = show_image(pixels(dtype='float32'), figsize=(2, 1), cmap='viridis', interpolation='bilinear', alpha=.5, vmin=-1, vmax=2)
    im = ax.images[0]
    assert (im.get_cmap().name, im.get_interpolation(), im.get_alpha(), im.get_clim()) == ('viridis', 'bilinear', .5, (-1, 2))
    assert_allclose(ax.figure.get_size_inches(), (2, 1))

def test_show_image_defaults():
    ax = show_image(pixels())
    assert ax.images[0].get_cmap().name == 'gray' and not ax.axison and ax.get_title() == ''
    assert show_image(pixels(), noframe=False).axison
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0

def test_show_image_draws_where_it_is_told():
    fig, ax = plt.subplots()
    assert show_image(pixels(3), ax, title='here') is ax
    assert plt.get_fignums() == [fig.number] and ax.get_title() == 'here'

@pytest.mark.parametrize('title, text', [('a', 'a'), (3, '3'), (0, '0'), (torch.tensor(3), '3'), (np.float32(.5), '0.5')])
def test_titles_of_any_type(title, text): assert show_image(pixels(), title=title).get_title() == text

def test_unknown_argument_is_refused():
    with pytest.raises(AttributeError, match='colour'): show_image(pixels(), colour='red')


# Grids

@pytest.mark.parametrize('n, nrows, ncols, shape', [
    (1, None, None, (1, 1)), (2, None, None, (1, 2)), (3, None, None, (1, 3)), (5, None, None, (2, 3)), (10, None, None, (3, 4)),
    (1, 1, None, (1, 1)), (2, 2, None, (2, 1)), (3, 2, None, (2, 2)), (5, 1, None, (1, 5)), (10, 4, None, (4, 3)),
    (1, None, 3, (1, 3)), (3, None, 2, (2, 2)), (5, None, 5, (1, 5)), (10, None, 4, (3, 4)), (5, 3, 4, (3, 4)), (10, 2, 5, (2, 5))])
def test_grid(n, nrows, ncols, shape):
    fig, axs = get_grid(n, nrows, ncols, imsize=.5, layout=None, subplot_kw=dict(xticks=[], yticks=[]))
    assert axs.shape == shape
    assert [ax.axison for ax in axs.flat] == [i < n for i in range(axs.size)]
    assert_allclose(fig.get_size_inches(), (shape[1]*.5, shape[0]*.5))

def test_every_grid_is_nearly_square_and_wastes_less_than_a_row():
    for n in range(1, 300):
        rows, cols = _grid_shape(n, None, None)
        assert n <= rows*cols < n + rows and rows <= cols <= rows + 2

def test_grid_too_small():
    with pytest.raises(ValueError, match=r'3 × 3 places for n=10. Did you mean nrows=4\?'): get_grid(10, nrows=3, ncols=3)
    with pytest.raises(ValueError, match='n=0'): get_grid(0)

def test_grid_title_and_matplotlib_arguments():
    fig, axs = get_grid(4, title='T', weight='normal', size=9, figsize=(3, 2), sharex=True, dpi=50, subplot_kw=dict(facecolor=RED))
    assert (fig.get_suptitle(), fig._suptitle.get_weight(), fig._suptitle.get_size()) == ('T', 'normal', 9)
    assert fig.dpi == 50 and axs[0, 0].get_facecolor() == to_rgba(RED)
    assert axs[0, 0].get_shared_x_axes().joined(axs[0, 0], axs[1, 1])
    assert_allclose(fig.get_size_inches(), (3, 2))

def test_subplots_is_shaped_as_matplotlib_does():
    assert isinstance(subplots()[1], plt.Axes)
    assert subplots(1, 3)[1].shape == (3,) and subplots(2, 3)[1].shape == (2, 3) and subplots(squeeze=False)[1].shape == (1, 1)
    fig, _ = subplots(2, 3, imsize=2, suptitle='S')
    assert fig.get_suptitle() == 'S'
    assert_allclose(fig.get_size_inches(), (6, 4))


# Many images

STACK = np.stack([pixels(dtype='float32') + i for i in range(5)])

@pytest.mark.parametrize('ims', [list(STACK), tuple(STACK), (im for im in STACK), STACK, STACK[..., None], torch.tensor(STACK),
                                 torch.tensor(STACK)[:, None]], ids=['list', 'tuple', 'generator', 'nhw', 'nhw1', 'tensor', 'n1hw'])
def test_images_of_every_container(ims):
    axs = show_images(ims, imsize=.5)
    assert axs.shape == (2, 3)
    for ax, want in zip(axs.flat, STACK, strict=False): assert_array_equal(shown(ax), want)
    assert not axs.flat[5].images and not axs.flat[5].axison

def test_a_colour_batch():
    x = torch.rand(4, 3, H, W)
    for ax, want in zip(show_images(x, imsize=.5).flat, x, strict=True): assert_array_equal(shown(ax), want.permute(1, 2, 0))

def test_titles_and_their_colours_may_be_too_few_or_too_many():
    axs = show_images(STACK, titles=['a', None, torch.tensor(7)], title_colors=[None, None, RED], imsize=2)
    assert [ax.get_title() for ax in axs.flat] == ['a', '', '7', '', '', '']
    assert [ax.title.get_color() == RED for ax in axs.flat] == [False, False, True, False, False, False]
    axs = show_images(STACK[:2], titles=torch.arange(9), imsize=1)
    assert [ax.get_title() for ax in axs.flat] == ['0', '1']

def test_long_titles_shrink_together_until_they_fit():
    axs = show_images(STACK, titles=['Ankle boot 100%\nis T-shirt/top', 'Bag'], imsize=1, ncols=5)
    axs[0, 0].figure.canvas.draw()
    place = axs[0, 0].get_window_extent().width
    assert .7*place < axs[0, 0].title.get_window_extent().width < 1.1*place
    assert len({ax.title.get_size() for ax in axs.flat}) == 1
    assert show_images(STACK, titles='abc', imsize=1)[0, 0].title.get_size() == 12     # short ones keep their size

def test_titles_do_not_make_the_images_smaller():
    def width(**kwargs):
        ax = show_images(STACK, imsize=1, **kwargs)[0, 0]
        ax.figure.canvas.draw()
        return ax.get_window_extent().width
    assert_allclose(width(titles=['a\nb']*5, title='T'), width(), rtol=.1)
    assert_allclose(show_images(STACK, titles='abc', figsize=(3, 2))[0, 0].figure.get_size_inches(), (3, 2))

def test_arguments_find_their_way_to_grid_and_image():
    axs = show_images(STACK, ncols=5, figsize=(5, 1), title='T', dpi=30, noframe=False,
                      cmap='magma', interpolation='nearest', alpha=.3, vmin=0, vmax=9, zorder=3)
    ax, fig = axs[0, 4], axs[0, 4].figure
    im = ax.images[0]
    assert (im.get_cmap().name, im.get_interpolation(), im.get_alpha(), im.get_clim(), im.zorder) == ('magma', 'nearest', .3, (0, 9), 3)
    assert ax.axison and fig.get_suptitle() == 'T' and fig.dpi == 30
    assert_allclose(fig.get_size_inches(), (5, 1))

@pytest.mark.parametrize('one', [GREY, pixels(), torch.zeros(H, W)], ids=['PIL', 'array', 'tensor'])
def test_one_image_is_not_several(one):
    with pytest.raises(TypeError, match=r'Did you mean show_image\?'): show_images(one)

def test_a_bad_image_leaves_no_half_filled_figure():
    with pytest.raises(ValueError, match='as_image'): show_images([pixels(), np.zeros(7)])
    with pytest.raises(ValueError, match='list of images empty'): show_images([])
    assert not plt.get_fignums()


# Signatures

@pytest.mark.parametrize('f, names, hidden', [
    (show_image,       'im ax cmap interpolation alpha vmin', 'kwargs'),
    (subplots,         'imsize suptitle sharex squeeze dpi facecolor', 'kwargs'),
    (get_grid,         'n title weight imsize sharex dpi', 'kwargs squeeze'),
    (show_images,      'ims titles title_colors title imsize sharex dpi cmap interpolation alpha', 'kwargs squeeze ax'),
    (show_predictions, 'preds names probs imsize cmap', 'kwargs titles'),
    (plot_curves,      'rows steps ends beta imsize figsize dpi', 'kwargs nrows')])
def test_help_shows_every_argument(f, names, hidden):
    known = set(inspect.signature(f).parameters)
    assert set(names.split()) <= known and not set(hidden.split()) & known


# Curves

ROWS = [dict(epoch=i, train_loss=2/(i + 1), valid_loss=2.5/(i + 1), lr=.1, train_accuracy=i/9, valid_accuracy=i/10, valid_f1=.5)
        for i in range(8)]

def lines(ax): return {tuple(np.asarray(l.get_ydata(), float)): l for l in ax.lines}

def test_curves_have_a_panel_for_each_metric_and_the_loss_first():
    fig = plot_curves([dict(reversed((r | dict(valid_aux_loss=1.)).items())) for r in ROWS])
    assert [ax.get_title() for ax in fig.axes] == ['loss', 'aux_loss', 'f1', 'accuracy']
    loss = fig.axes[0]
    assert {tuple(r[f'{part}_loss'] for r in ROWS) for part in ('train', 'valid')} == set(lines(loss))
    assert {t.get_text() for t in loss.texts} == {'train 0.25', 'valid 0.3125'}
    assert all(t == int(t) for t in loss.get_xticks())

def test_the_two_labels_never_collide():
    for gap in (.05, .001, 0, -.001, -.05):
        fig = plot_curves([dict(epoch=i, train_loss=1/(i + 1), valid_loss=1/(i + 1) + gap) for i in range(4)])
        fig.canvas.draw()
        a, b = (t.get_window_extent() for t in fig.axes[0].texts)
        assert not a.overlaps(b) or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
        assert not any(t.get_window_extent().x1 > fig.bbox.x1 for t in fig.axes[0].texts)

def test_one_epoch():
    fig = plot_curves(ROWS[:1])
    assert list(fig.axes[0].get_xticks()) == [0]
    assert all(l.get_marker() == 'o' for l in fig.axes[0].lines)

def test_nan_and_missing_values_leave_gaps_and_the_axis_shows_all_epochs():
    rows = [dict(train_loss=1. if i < 2 else float('nan'), valid_loss=None) | (dict(valid_f1=.5) if i else {}) for i in range(5)]
    fig = plot_curves(rows)
    loss, f1 = fig.axes
    assert [t.get_text() for t in loss.texts] == ['train 1']
    assert loss.get_xlim()[1] > 4 and np.isnan(f1.lines[0].get_ydata()[0])

def test_values_may_be_tensors_and_epochs_may_start_anywhere():
    fig = plot_curves([dict(epoch=7 + i, train_loss=torch.tensor(.5 + i, requires_grad=True)) for i in range(3)])
    assert_array_equal(fig.axes[0].lines[0].get_xdata(), [7, 8, 9])
    assert_array_equal(fig.axes[0].lines[0].get_ydata(), [.5, 1.5, 2.5])

def test_steps_stand_in_their_epochs_when_these_have_different_lengths():
    rows = [dict(epoch=i, train_loss=1.) for i in range(3)]
    x = plot_curves(rows, range(10), [6, 8, 10]).axes[0].lines[-1].get_xdata()
    assert_allclose(x, [*np.arange(1, 7)/6 - 1, .5, 1, 1.5, 2])
    even = plot_curves(rows, range(9)).axes[0].lines[-1].get_xdata()
    assert_allclose(even, plot_curves(rows, range(9), [3, 6, 9]).axes[0].lines[-1].get_xdata())

def test_steps_take_the_place_of_the_training_loss():
    steps = torch.rand(80, requires_grad=True) + 1
    loss = plot_curves(ROWS, steps).axes[0]
    ys = [np.asarray(l.get_ydata()) for l in loss.lines]
    assert sorted(map(len, ys)) == [8, 80, 80]
    assert_allclose(loss.lines[-1].get_ydata(), steps.detach())
    assert_allclose(loss.lines[-1].get_xdata()[[9, -1]], (0, 7))      # ten steps an epoch: the tenth ends epoch 0
    assert any(np.allclose(y, smooth(steps, .5)) for y in ys if len(y) == 80)
    assert plot_curves([dict(valid_accuracy=.5)], [1., 2.]).axes[0].get_title() == 'loss'
    assert len(plot_curves(ROWS, []).axes[0].lines) == 2

def test_curve_errors():
    for rows in ([], [dict(epoch=0, loss=1.)]):
        with pytest.raises(ValueError, match='no train_... or valid_...'): plot_curves(rows)
    with pytest.raises(ValueError, match='1 ends for 2 rows'): plot_curves(ROWS[:2], [.5]*4, [2])

def test_curves_size():
    assert_allclose(plot_curves(ROWS, imsize=1.5).get_size_inches(), (6, 1.5))
    assert_allclose(plot_curves(ROWS, figsize=(7, 2)).get_size_inches(), (7, 2))

def test_smooth_against_its_definition():
    xs = np.random.default_rng(0).normal(size=50)
    xs[[3, 20]] = np.nan, np.inf
    ok = np.isfinite(xs)
    w = .8**abs(np.subtract.outer(np.arange(50), np.arange(50))) * ok
    want = np.where(ok, w @ np.where(ok, xs, 0) / w.sum(1), np.nan)
    assert_allclose(smooth(xs, .8), want)
    assert_allclose(smooth(xs, 0), np.where(ok, xs, np.nan))


# Confusion

@pytest.mark.parametrize('c, kind', [(2, np.asarray), (3, torch.tensor), (10, np.ndarray.tolist), (12, np.asarray)])
def test_confusion(c, kind):
    m = np.random.default_rng(c).integers(0, 50, (c, c)) + np.eye(c, dtype=int)*500
    m[1] = 0                                                        # a class that never came
    names = [f'T-shirt/top {i}' for i in range(c)]
    ax = plot_confusion(kind(m), names)
    assert {t.get_position()[::-1]: t.get_text() for t in ax.texts} == {(i, j): str(m[i, j]) for i,j in np.argwhere(m)}
    depth = np.sqrt(m / np.maximum(m.sum(1, keepdims=True), 1))
    assert_allclose(shown(ax), depth * (2*np.eye(c) - 1))
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()): assert [t.get_text() for t in labels] == names
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('predicted', 'true')

def test_confusion_of_shares_and_options():
    fig, ax = plt.subplots()
    assert plot_confusion([[.9, .1], [.25, .75]], ax=ax, title='shares') is ax
    assert [t.get_text() for t in ax.texts] == ['0.90', '0.10', '0.25', '0.75'] and ax.get_title() == 'shares'
    assert [t.get_text() for t in ax.get_yticklabels()] == ['0', '1']
    assert_allclose(plot_confusion(np.eye(3), figsize=(2, 2)).figure.get_size_inches(), (2, 2))

def test_confusion_numbers_fit_their_cells_and_can_be_read():
    ax = plot_confusion(np.eye(16, dtype=int)*1000 + 7, figsize=(6.4, 6.4))
    ax.figure.canvas.draw()
    cell = ax.get_window_extent().width / 16
    assert max(t.get_window_extent().width for t in ax.texts) < cell
    assert {t.get_color() for t in ax.texts if t.get_text() == '1007'} == {'white'}
    assert {t.get_color() for t in ax.texts if t.get_text() == '7'} == {'black'}

@pytest.mark.parametrize('shape, names', [((2, 3), 'ab'), ((3, 3), 'ab'), ((4,), 'abcd'), ((2, 3), None)])
def test_confusion_errors(shape, names):
    with pytest.raises(ValueError, match='plot_confusion'): plot_confusion(np.ones(shape), names)


# Predictions

NAMES = ['cat', 'dog', 'emu']

@pytest.mark.parametrize('kind', [list, torch.tensor])
def test_wrong_predictions_are_marked_three_times(kind):
    axs = show_predictions(STACK, kind([0, 1, 2, 0, 1]), kind([0, 1, 1, 0, 2]), NAMES)
    assert [ax.get_title() for ax in axs.flat] == ['cat', 'dog', 'emu\nis dog', 'cat', 'dog\nis emu', '']
    wrong = [False, False, True, False, True, False]
    assert [ax.axison and ax.spines['left'].get_edgecolor() == to_rgba(RED) for ax in axs.flat] == wrong
    assert [ax.title.get_color() == RED for ax in axs.flat] == wrong
    assert_array_equal(shown(axs[0, 2]), STACK[2])

@pytest.mark.parametrize('probs', [[.5, .25, 1.], [[.5, .2, .3], [.7, .25, .05], [0, 0, 1]]], ids=['of the prediction', 'of each class'])
@pytest.mark.parametrize('kind', [np.array, torch.tensor])
def test_probabilities(probs, kind):
    axs = show_predictions(STACK[:3], [0, 1, 2], [0, 1, 0], NAMES, kind(probs), ncols=3, cmap='magma', title='T')
    assert [ax.get_title() for ax in axs.flat] == ['cat 50%', 'dog 25%', 'emu 100%\nis cat']
    assert axs[0, 0].images[0].get_cmap().name == 'magma' and axs[0, 0].figure.get_suptitle() == 'T'

def test_predictions_without_names_and_from_a_generator():
    axs = show_predictions((im for im in STACK[:2]), [4, 2], [4, 3])
    assert [ax.get_title() for ax in axs.flat] == ['4', '2\nis 3']

@pytest.mark.parametrize('preds, targs, words', [
    ([0, 1], [0, 1, 2], r'3 images want 3 classes; got preds of shape \(2,\)'),
    (np.eye(3), [0, 1, 2], r'Did you mean preds.argmax\(1\)\?')])
def test_prediction_errors(preds, targs, words):
    with pytest.raises(ValueError, match=words): show_predictions(STACK[:3], preds, targs)
    with pytest.raises(ValueError): show_predictions(STACK[:3], targs, targs, probs=[.5])


def test_the_floor_imports_neither_torch_nor_pil_itself():
    "Matplotlib brings PIL along, so of PIL we can only ask the source."
    import miniai.plot as plot
    assert not {'torch', 'Image'} & set(vars(plot)) and 'import PIL' not in inspect.getsource(plot)
    code = f"import sys, runpy; runpy.run_path({plot.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_as_array():
    assert as_array(3).shape == () and as_array([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
