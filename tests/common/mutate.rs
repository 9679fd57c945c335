//! Broken files.

use rand_pcg::Pcg64Dxsm;
use rand_pcg::rand_core::Rng;

pub fn below(rng: &mut Pcg64Dxsm, n: usize) -> usize {
    (rng.next_u64() % n.max(1) as u64) as usize
}

/// Breaks a file the way disks, editors and attackers do.
pub fn mutate(bytes: &[u8], rng: &mut Pcg64Dxsm) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=below(rng, 3) {
        if bytes.is_empty() {
            break;
        }
        let at = below(rng, bytes.len());
        // Headers and small files are where it hurts.
        let at = if rng.next_u64().is_multiple_of(2) { at.min(below(rng, 2000)) } else { at };
        match below(rng, 9) {
            0 => bytes[at] ^= 1 << below(rng, 8),
            1 => bytes[at] = rng.next_u64() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..(at + 1 + below(rng, 64)).min(bytes.len()))),
            4 => {
                let chunk = bytes[at..(at + 1 + below(rng, 64)).min(bytes.len())].to_vec();
                bytes.splice(at..at, chunk);
            }
            // A number becomes another one, often an absurd one.
            5 | 6 => {
                let digits = |b: &u8| b.is_ascii_digit();
                let Some(start) = (at..bytes.len()).find(|&i| digits(&bytes[i])) else { continue };
                let end = (start..bytes.len()).find(|&i| !digits(&bytes[i])).unwrap_or(bytes.len());
                let numbers: [&[u8]; 8] = [
                    b"0",
                    b"-1",
                    b"1",
                    b"4294967296",
                    b"9223372036854775807",
                    b"18446744073709551616",
                    b"1e308",
                    b"3.5",
                ];
                bytes.splice(start..end, numbers[below(rng, numbers.len())].iter().copied());
            }
            // The length that a safetensors file begins with.
            7 => {
                let end = bytes.len().min(8);
                let length = (rng.next_u64() >> below(rng, 64)).to_le_bytes();
                bytes[..end].copy_from_slice(&length[..end]);
            }
            _ => {
                let words: [&[u8]; 6] = [b"[[[[[[[[", b"{\"a\":", b"null", b"\xff\xfe", b"\"\\ud800\"", b"NaN"];
                bytes.splice(at..at, words[below(rng, words.len())].iter().copied());
            }
        }
    }
    bytes
}
