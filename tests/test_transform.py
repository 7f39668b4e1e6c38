"Batch transforms against loops over single images with the same draws"
import numpy as np, pytest, torch
import torch.nn.functional as F
from miniai import transform as m
from miniai.core import Draw

N, C = 40, 5
SHAPES = [(1, 28, 28), (3, 9, 12), (4, 6, 5)]

def batch(shape=(1, 28, 28), dtype=torch.uint8, n=N):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g)
    return (x if dtype == torch.uint8 else (x/255).to(dtype)), torch.arange(n) % C

def draw(n=N, epoch=0): return Draw(7, epoch, range(100, 100+n))

# one image at a time, in plain Python: `one(t, x, i, d)` changes x[i], with the numbers that the whole batch draws

def flip(t, x, d):
    mirror = d.bernoulli(t.p).tolist()
    return [o.flip(-1) if mirror[i] else o for i,o in enumerate(x)]

def crop(t, x, d):
    shifts, h, w = d.integers(0, 2*t.pad+1, 2).tolist(), *x.shape[2:]
    out = []
    for (top, left), o in zip(shifts, x.numpy(), strict=True):
        wide = np.pad(o, ((0,0), (t.pad,)*2, (t.pad,)*2), mode=dict(zero='constant', reflect='reflect')[t.mode])
        out.append(torch.from_numpy(wide[:, top:top+h, left:left+w].copy()))
    return some(t, x, out, d)

def some(t, x, new, d):
    if t.p == 1: return new
    return [b if yes else a for a,b,yes in zip(x, new, d.bernoulli(t.p).tolist(), strict=True)]

def blot(o, top, left, height, width, value):
    o = o.clone()
    for r in range(max(top, 0), min(top+height, o.shape[1])):
        for k in range(max(left, 0), min(left+width, o.shape[2])): o[:, r, k] = value
    return o

def cutout(t, x, d):
    h, w = x.shape[2:]
    rows, cols = d.uniform().tolist(), d.uniform().tolist()
    return some(t, x, [blot(o, int(r*h)-t.size//2, int(k*w)-t.size//2, t.size, t.size, t.value) for o,r,k in zip(x, rows, cols, strict=True)], d)

def erase(t, x, d):
    (h, w), out = x.shape[2:], []
    for o, (share, shape, top, left) in zip(x, d.uniform(4).tolist(), strict=True):
        area, shape = h*w*(t.area[0] + share*(t.area[1]-t.area[0])), t.ratio**(2*shape-1)
        height, width = (min(max(round((area*r)**.5), 1), most) for r,most in ((shape, h), (1/shape, w)))
        out.append(blot(o, int(top*(h-height+1)), int(left*(w-width+1)), height, width, t.value))
    return some(t, x, out, d)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('t, loop', [
    (m.Flip(), flip), (m.Flip(.2), flip),
    (m.RandomCrop(3), crop), (m.RandomCrop(4, 'reflect'), crop), (m.RandomCrop(9, p=.4), crop), (m.RandomCrop(2, 'reflect', p=.5), crop),
    (m.Cutout(4), cutout), (m.Cutout(5, value=3, p=.7), cutout), (m.Cutout(30), cutout),
    (m.RandomErase(), erase), (m.RandomErase(p=1, area=(.3, 1), ratio=1, value=1), erase)], ids=lambda o: o.__name__ if callable(o) and hasattr(o, '__name__') else repr(o))
def test_like_a_loop_over_images(t, loop, shape, dtype):
    x, y = batch(shape, dtype)
    before = x.clone()
    got, same = t((x, y), draw())
    want = torch.stack(loop(t, x, draw()))
    assert got.dtype == dtype and got.equal(want) and same is y
    assert x.equal(before)                                         # the batch itself is left alone
    if t.p != .2: assert not got.equal(x)

def mixed(t, x, y, d):
    other, lam = d.partner().tolist(), [b if yes else 1. for yes,b in zip(d.bernoulli(t.p).tolist(), d.beta(t.alpha).tolist(), strict=True)]
    xs, ys, (h, w) = [], [], x.shape[2:]
    centres = list(zip(d.uniform().tolist(), d.uniform().tolist(), strict=True)) if isinstance(t, m.CutMix) else [None]*len(x)
    for i, (j, a, centre) in enumerate(zip(other, lam, centres, strict=True)):
        if centre is None:
            o = a*x[i].double() + (1-a)*x[j].double()
            xs.append(o.round() if x.dtype == torch.uint8 else o)
        else:
            height, width = (round(float(torch.tensor(1-a).sqrt()*s)) for s in (h, w))
            top, left = int(centre[0]*h)-height//2, int(centre[1]*w)-width//2
            o, n = x[i].clone(), 0
            for r in range(max(top, 0), min(top+height, h)):
                for k in range(max(left, 0), min(left+width, w)): o[:, r, k], n = x[j][:, r, k], n+1
            xs.append(o)
            a = 1 - n/(h*w)
        ys.append(a*F.one_hot(y[i], C) + (1-a)*F.one_hot(y[j], C))
    return torch.stack(xs), torch.stack(ys)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('t', [m.Mixup(C), m.Mixup(C, .2, p=.6), m.CutMix(C), m.CutMix(C, 3., p=.6)], ids=repr)
def test_mixing_like_a_loop_over_images(t, shape, dtype):
    x, y = batch(shape, dtype)
    got = t(dict(label=y, image=x), draw())
    want_x, want_y = mixed(t, x, y, draw())
    assert list(got) == ['label', 'image'] and got['image'].dtype == dtype
    exact = dict(atol=0, rtol=0) if isinstance(t, m.CutMix) else dict(atol=1 if dtype == torch.uint8 else 1e-5, rtol=0)
    torch.testing.assert_close(got['image'].double(), want_x.double(), **exact)
    torch.testing.assert_close(got['label'].double(), want_y.double(), atol=1e-6, rtol=0)
    if isinstance(t, m.Mixup) and dtype == torch.uint8: assert (got['image'] != want_x).float().mean() < .001    # a tie in rounding at most

@pytest.mark.parametrize('t', [m.Flip(0), m.RandomCrop(p=0), m.RandomCrop(2, 'reflect', p=0), m.Cutout(p=0), m.RandomErase(0)], ids=repr)
def test_p_0_is_identity(t):
    for dtype in (torch.uint8, torch.float32):
        x, y = batch(dtype=dtype)
        assert t((x, y), draw())[0].equal(x)

@pytest.mark.parametrize('t', [m.Mixup(C, p=0), m.CutMix(C, p=0)], ids=repr)
def test_p_0_mixes_nothing(t):
    for dtype in (torch.uint8, torch.float32):
        x, y = batch(dtype=dtype)
        same, soft = t((x, y), draw())
        assert same.equal(x) and soft.equal(F.one_hot(y, C).float())
    z = torch.randn(N, C)
    torch.testing.assert_close(F.cross_entropy(z, soft), F.cross_entropy(z, y))

EACH = [m.Flip(), m.Flip(alternate=True), m.RandomCrop(3), m.RandomCrop(2, 'reflect', p=.5), m.Cutout(6), m.RandomErase(), m.Compose(m.RandomCrop(4), m.Flip(), m.RandomErase())]

@pytest.mark.parametrize('t', EACH, ids=repr)
def test_a_row_draws_the_same_in_any_batch(t):
    x, _ = batch()
    whole = t(x, draw())
    for size in (1, 7, 16):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(size))
        parts = torch.cat([t(x[i], Draw(7, 0, 100+i)) for i in order.split(size)])
        assert parts.equal(whole[order])
    assert not t(x, draw(epoch=1)).equal(whole) and t(x, draw()).equal(whole)

@pytest.mark.parametrize('t', [*EACH, m.Mixup(C), m.CutMix(C), m.Normalize(.3, .2)], ids=repr)
def test_the_global_generator_is_left_alone(t):
    torch.manual_seed(3)
    want = torch.rand(5)
    torch.manual_seed(3)
    m.Compose(t)(batch(), draw())
    assert torch.rand(5).equal(want)

def test_every_shift_occurs_and_none_beyond():
    x = torch.zeros(2000, 1, 9, 9)
    x[:,:,4,4] = 1
    places = {divmod(o.argmax().item(), 9) for o in m.RandomCrop(2)(x, draw(2000))}
    assert places == {(r, k) for r in range(2, 7) for k in range(2, 7)}

def test_alternating_flips_take_turns():
    x, _ = batch()
    flip = m.Flip(.3, alternate=True)
    seen = [flip(x, draw(epoch=e)) for e in range(5)]
    for a,b in zip(seen, seen[1:], strict=False): assert b.equal(a.flip(-1))
    first = flip.which(Draw(1, 0, range(20_000)))
    assert abs(first.float().mean() - .3) < .02 and abs((first & flip.which(Draw(2, 0, range(20_000)))).float().mean() - .09) < .02
    other = Draw(1, 0, range(20_000)).bernoulli(.3)                # what any other transform would draw first
    assert abs((first & other).float().mean() - .09) < .02
    for p,want in ((0, x), (1, x.flip(-1))): assert m.Flip(p, alternate=True)(x, draw()).equal(want)

def test_each_image_is_the_partner_of_one():
    x, y = torch.zeros(N, 1, 4, 4), torch.arange(N)
    _, soft = m.Mixup(N)((x, y), draw())
    lam = soft.diagonal()
    others = soft - torch.diag(lam)
    assert soft.sum(1).allclose(torch.ones(N)) and ((others > 0).sum(0) <= 1).all() and ((others > 0).sum(1) <= 1).all()

def test_mixing_twice_takes_probabilities():
    x, y = batch()
    x, soft = m.Compose(m.Mixup(C), m.CutMix(C))((x, y), draw())
    assert soft.shape == (N, C) and soft.sum(1).allclose(torch.ones(N)) and x.dtype == torch.uint8

def test_learning_from_mixed_labels():
    from miniai.loss import cross_entropy
    z, (_, y) = torch.randn(N, C), m.Mixup(C)(batch(), draw())
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y))

@pytest.mark.parametrize('t, given, error, why', [
    (m.Flip(), lambda x, y: y, ValueError, r'Flip: images are \(n, c, h, w\), bytes or floats, got 40 torch.int64'),
    (m.Flip(), lambda x, y: x[0], ValueError, r'Flip: images are .*, got 1×28×28 torch.uint8'),
    (m.RandomCrop(), lambda x, y: (x.long(), y), ValueError, 'RandomCrop: images are .*, got 40×1×28×28 torch.int64'),
    (m.Cutout(), lambda x, y: (x[:3], y), ValueError, 'Cutout: 3 images, and a draw for 40 rows'),
    (m.Flip(), lambda x, y: (y, y), ValueError, 'Flip: images have four dimensions .n, c, h, w., and this batch has none of them: 0: 40 torch.int64, 1: 40'),
    (m.Flip(), lambda x, y: dict(a=x, b=x, n=['a']*N), ValueError, 'this batch has 2 of them: a: 40×1×28×28 torch.uint8, b: 40'),
    (m.Compose(m.Flip(), m.Mixup(C)), lambda x, y: x, TypeError, 'Mixup: the batch has to hold labels beside the images, it is 40×1×28×28'),
    (m.Mixup(C), lambda x, y: (x, y, y), ValueError, 'Mixup: labels are .n,. whole numbers or .n, 5. probabilities, and this batch has 2 of them'),
    (m.CutMix(C), lambda x, y: (x, y.float()), ValueError, 'CutMix: labels are .*, and this batch has none of them'),
    (m.CutMix(4), lambda x, y: (x, y), ValueError, 'CutMix: label 4 in a batch, and the classes are 0 to 3'),
    (m.Mixup(C), lambda x, y: (x, y-1), ValueError, 'Mixup: label -1 in a batch, and the classes are 0 to 4'),
    (m.RandomCrop(28, 'reflect'), lambda x, y: x, ValueError, 'RandomCrop: a mirrored border of 28 pixels is too wide for 40×1×28×28'),
])
def test_what_is_wrong_is_said(t, given, error, why):
    with pytest.raises(error, match=why): t(given(*batch()), draw())

@pytest.mark.parametrize('make, why', [
    (lambda: m.Flip(1.5), 'Flip: p is a probability from 0 to 1, it is 1.5'),
    (lambda: m.Mixup(3, p=-1), 'Mixup: p is a probability'),
    (lambda: m.RandomCrop(0), 'pad is from 1 up'),
    (lambda: m.RandomCrop(2, 'edge'), 'mode zero or reflect, not 2 and edge'),
    (lambda: m.RandomErase(area=(0, .2)), 'area is two shares'),
    (lambda: m.RandomErase(ratio=2), 'ratio above 0 and up to 1'),
])
def test_arguments_are_checked(make, why):
    with pytest.raises(ValueError, match=why): make()

def test_compose():
    assert m.Compose(None, m.Flip(), None).takes_draw and not m.Compose(None, torch.neg).takes_draw
    x, y = batch(dtype=torch.float32)
    assert m.Compose(lambda b: (b[0]+1, b[1]), None)((x, y))[0].equal(x+1)
    assert repr(m.Compose(m.Flip(), m.Cutout(3))) == 'Compose(Flip(p=0.5, alternate=False), Cutout(p=1.0, size=3, value=0))'
    import pickle
    assert pickle.loads(pickle.dumps(m.Compose(m.Flip(), m.Normalize(.1, .2))))((batch()), draw())[0].dtype == torch.float32


# Normalize

def test_normalize_by_channel():
    x, _ = batch((3, 9, 9), n=2)
    x[:,1] = 7
    norm = m.Normalize.measure(x)
    torch.testing.assert_close(norm.mean, (x/255).mean((0, 2, 3)))
    torch.testing.assert_close(norm.std[[0, 2]], (x/255).std((0, 2, 3), correction=0)[[0, 2]])
    y = norm(x)
    assert y[:,1].abs().max() < 1e-5                # a channel that never changes
    torch.testing.assert_close(norm.inverse(y), x/255)
    torch.testing.assert_close(norm(x[0]), y[0])
    torch.testing.assert_close(y, (x/255 - norm.mean.view(-1, 1, 1))/norm.std.view(-1, 1, 1), rtol=1e-5, atol=1e-5)
    assert x.dtype == torch.uint8 and (x[:,1] == 7).all()  # the batch itself is left alone
    for bad in (y, x[:,:2]):
        with pytest.raises(ValueError, match='Normalize: for bytes in 3 channels, got'): norm(bad)

def test_normalize_measures_in_pieces():
    x, _ = batch((2, 3, 3), n=3000)
    norm = m.Normalize.measure(x)
    torch.testing.assert_close(norm.mean, (x/255).mean((0, 2, 3)))
    torch.testing.assert_close(norm.std, (x/255).std((0, 2, 3), correction=0))

def test_normalize_measures_evenly_spread_rows_of_much():
    few, _ = batch((2, 3, 3), n=300)
    class Big(torch.Tensor): nbytes = 3*2**28 - 5                   # says it is larger than it is
    a, b = m.Normalize.measure(few.as_subclass(Big)), m.Normalize.measure(few[::3])
    assert a.mean.equal(b.mean) and a.std.equal(b.std)

def test_normalize_goes_to_the_device_and_back():
    norm = m.Normalize(.3, .2)
    x, _ = batch()
    assert norm(x.to('meta')).device.type == 'meta' and norm(x).equal(m.Normalize(.3, .2)(x)) and norm.mean.device.type == 'cpu'

def test_normalize_finds_the_images():
    x, y = batch()
    norm = m.Normalize(.5, .25)
    assert norm((y, x))[1].equal(norm(x)) and list(norm(dict(a=y, b=x))) == ['a', 'b']
    with pytest.raises(ValueError, match='Normalize: images have four dimensions'): norm((y,))
