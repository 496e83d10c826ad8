//! A piece of an image's content from the file that it was imported from, read again.

use std::fs::File;

use super::content::{Content, Format, Scratch, padded_size};
use crate::error::{Error, Kind, Result};

/// Reads `len` bytes at `offset` of the content of `file`, which is `length` bytes long and of `format`.
/// They may be anything: whoever asks compares them. `size` is that of the image.
///
/// # Errors
/// `Corrupt` if the content is not of that size; whatever else reading a hostile file can lead to.
pub fn read_again(
    file: File,
    length: u64,
    format: Format,
    size: u64,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>> {
    let name = "the file that the image was imported from";
    let content = Content::open(file, length, format, name)?;
    if padded_size(content.size(), name)? != size {
        let what = format!("{name} holds {} bytes, and the image {size}", content.size());
        return Err(Error::new(Kind::Corrupt, what));
    }
    if offset.checked_add(len as u64).is_none_or(|end| end > size) {
        return Err(Error::new(Kind::OutOfRange, "past the end of the image"));
    }
    let mut bytes = vec![0; len];
    content.read(offset, &mut bytes, &mut Scratch::default())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_same_offset_of_a_raw_file_is_read_and_its_padding_is_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..1000).map(|at| at as u8).collect();
        file.write_all(&content).unwrap();
        let read = |size, offset, len| {
            let file = file.try_clone().unwrap();
            read_again(file, 1000, Format::Raw, size, offset, len).map_err(|error| error.kind())
        };
        assert_eq!(read(1024, 512, 100).unwrap(), content[512..612]);
        let end = read(1024, 512, 512).unwrap();
        assert!(end[..488] == content[512..] && end[488..].iter().all(|byte| *byte == 0));
        assert_eq!(read(2048, 0, 512), Err(Kind::Corrupt));
        assert_eq!(read(1024, 1000, 512), Err(Kind::OutOfRange));
        assert_eq!(read(1024, u64::MAX, 512), Err(Kind::OutOfRange));
    }
}
