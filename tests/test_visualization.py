import numpy as np
import pytest
from PIL import Image

from modeling_restr.visualization import add_legend, arrange_in_grid, draw_masks, draw_tile, get_color, save_image


def test_masks_are_tinted_in_their_colour_and_nothing_else_changes():
    image = Image.new("RGB", (60, 40), (200, 200, 200))
    first, second = np.zeros((40, 60), dtype=bool), np.zeros((40, 60), dtype=np.uint8)
    first[5:15, 5:20] = True
    second[25:35, 40:55] = 255
    drawn = np.asarray(draw_masks(image, [first, Image.fromarray(second)])).astype(int)
    for index, pixel in enumerate([drawn[10, 12], drawn[30, 47]]):
        expected = (np.array((200, 200, 200)) + np.array(get_color(index))) / 2
        assert np.abs(pixel - expected).max() <= 2
    assert (drawn[4, 12] == get_color(0)).all()  # the outline, just outside
    untouched = np.ones((40, 60), dtype=bool)
    untouched[3:17, 3:22] = untouched[23:37, 38:57] = False
    assert (drawn[untouched] == 200).all()


def test_overlay_of_an_empty_mask_is_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    assert (np.asarray(draw_masks(image, [np.zeros((20, 30))])) == np.asarray(image)).all()


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size .* 30x20, got 10x20 pixels"):
        draw_masks(Image.new("RGB", (30, 20)), [np.zeros((20, 10))])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_any_image_mode_is_drawn_on(mode):
    assert draw_masks(Image.new(mode, (30, 20)), [np.ones((20, 30))]).mode == "RGB"


def test_legend_has_a_swatch_for_each_label_below_the_image():
    image = Image.new("RGB", (320, 100), (1, 2, 3))
    labels = ["the dog", "a sentence that is far too long to stand on one line of a picture as narrow as this", "cat"]
    picture = np.asarray(add_legend(image, labels))
    assert (picture[:100] == (1, 2, 3)).all()
    legend = picture[100:]
    rows = [np.flatnonzero((legend == get_color(index)).all(axis=2).any(axis=1)) for index in range(len(labels))]
    assert all(len(found) > 10 for found in rows)
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()
    assert rows[2].min() - rows[1].min() > rows[1].min() - rows[0].min()  # the long label takes more lines


def test_tiles_show_the_masks_in_their_colours_and_the_labels():
    image = Image.new("L", (160, 80), 128)
    target, predicted = np.zeros((2, 80, 160), dtype=bool)
    target[10:30, 10:50], predicted[50:70, 100:150] = True, True
    tile = np.asarray(draw_tile(image, [target, Image.fromarray(predicted)], ["the dog", "IoU 0"])).astype(int)
    assert tile.shape[1] == 320 and tile.shape[0] > 160  # the legend is below
    for index, (row, column) in enumerate([(40, 60), (120, 250)]):
        expected = (np.array(get_color(index)) + 128) / 2
        assert np.abs(tile[row, column] - expected).max() <= 2
    other = np.asarray(draw_tile(image, [target, predicted], ["the cat", "IoU 0"]))
    assert (other[:160] == tile[:160]).all() and (other[160:] != tile[160:]).any()
    assert draw_tile(image.resize((1000, 1)), [], [], size=100).width == 100
    image.getexif()[0x0112] = 6  # a quarter turn
    assert draw_tile(image, [target.T], ["the dog"]).width == 160


def test_grid_is_filled_row_by_row_and_white_elsewhere():
    sizes = [(10, 5), (4, 8), (6, 6)]
    images = [Image.new("RGB", size, (number, 0, 0)) for number, size in enumerate(sizes)]
    sheet = np.asarray(arrange_in_grid(images, columns=2))
    assert sheet.shape == (16, 20, 3)
    expected = np.full((16, 20, 3), 255)
    for number, ((left, top), (width, height)) in enumerate(zip([(0, 0), (10, 0), (0, 8)], sizes)):
        expected[top : top + height, left : left + width] = (number, 0, 0)
    assert (sheet == expected).all()
    assert arrange_in_grid(images, columns=4).size == (30, 8)


def test_pictures_are_written_atomically(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    path = save_image(image, tmp_path / "new" / "picture.png")
    assert (np.asarray(Image.open(path)) == np.asarray(image)).all()
    with pytest.raises(OSError):
        save_image(Image.new("HSV", (2, 2)), path)  # PNG has no such mode
    assert (np.asarray(Image.open(path)) == np.asarray(image)).all()
