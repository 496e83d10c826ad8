//! Bytes made worse.

use fastrand::Rng;

/// Numbers at which things tend to break.
const NUMBERS: [u64; 14] =
    [0, 1, 2, 7, 64, 511, 512, 4096, 65536, 1 << 20, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];

/// One of the numbers at which things tend to break, or near it.
pub fn number(rng: &mut Rng) -> u64 {
    let number = NUMBERS[rng.usize(..NUMBERS.len())];
    number.wrapping_add(rng.u64(..3)).wrapping_sub(1)
}

/// Changes something; `others` are what a piece may be taken from. Not empty afterwards if it was not before,
/// and at most `most` bytes.
pub fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>, others: &[Vec<u8>], most: usize) {
    if bytes.is_empty() {
        bytes.push(rng.u8(..));
    }
    let at = rng.usize(..bytes.len());
    match rng.u8(..9) {
        0 => bytes[at] ^= 1 << rng.u8(..8),
        1 => bytes[at] = rng.u8(..),
        2 => bytes.insert(at, rng.u8(..)),
        3 => drop(bytes.remove(at)),
        4 => bytes.truncate(at.max(1)),
        5 => {
            // A number where one may be: lengths, counts, offsets, in either order of their bytes.
            let (number, width) = (number(rng), 1 << rng.u8(..4));
            let mut field = number.to_be_bytes()[8 - width..].to_vec();
            if rng.bool() {
                field.reverse();
            }
            let at = if rng.bool() { at / width * width } else { at };
            let end = bytes.len().min(at + width);
            bytes[at..end].copy_from_slice(&field[..end - at]);
        }
        6 if !others.is_empty() => {
            let other = &others[rng.usize(..others.len())];
            bytes.truncate(at);
            bytes.extend(&other[rng.usize(..=other.len())..]);
        }
        7 => {
            let end = (at + rng.usize(..5000)).min(bytes.len());
            let to = rng.usize(..=bytes.len() - (end - at));
            bytes.copy_within(at..end, to);
        }
        _ => {
            let noise: Vec<u8> = (0..rng.usize(..300)).map(|_| rng.u8(..)).collect();
            bytes.splice(at..at, noise);
        }
    }
    bytes.truncate(most);
    if bytes.is_empty() {
        bytes.push(0);
    }
}

/// Changes bytes where they stand: what is read has its length by another way.
pub fn scribble(rng: &mut Rng, bytes: &mut [u8]) {
    let at = rng.usize(..bytes.len());
    match rng.u8(..5) {
        0 => bytes[at] ^= 1 << rng.u8(..8),
        1 => bytes[at] = rng.u8(..),
        2 | 3 => {
            let (number, width) = (number(rng), 1 << rng.u8(..4));
            let at = at / width * width;
            let end = bytes.len().min(at + width);
            let field = if rng.bool() { number } else { rng.u64(..) };
            bytes[at..end].copy_from_slice(&field.to_le_bytes()[..end - at]);
        }
        _ => {
            let end = (at + rng.usize(..600)).min(bytes.len());
            let to = rng.usize(..=bytes.len() - (end - at));
            bytes.copy_within(at..end, to);
        }
    }
}

/// Makes the checksum right that `bytes` have of themselves, its own four bytes taken as zeros.
pub fn checksum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let crc = crc32fast::hash(bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}
