package nixproto

import (
	"errors"
	"fmt"
)

// nix32 is Nix's base 32 (libutil's base-nix-32.cc): the bytes are a number,
// the first byte its least significant, written with its most significant
// digit first. Its alphabet lacks e, o, t and u.
const nix32Alphabet = "0123456789abcdfghijklmnpqrsvwxyz"

// nix32Values holds the value of each character, noNix32 for those that are
// not in the alphabet.
var nix32Values = func() (t [256]uint8) {
	for i := range t {
		t[i] = noNix32
	}
	for i := range len(nix32Alphabet) {
		t[nix32Alphabet[i]] = uint8(i)
	}
	return t
}()

const noNix32 = 0xff

// nix32Value returns the value of one nix32 character, -1 if it is none.
func nix32Value(c byte) int { return int(int8(nix32Values[c])) }

// nix32Len returns the number of characters for n bytes.
func nix32Len(n int) int { return (n*8 + 4) / 5 }

// EncodeNix32 returns b in nix32: 32 characters for 20 bytes, 52 for 32.
func EncodeNix32(b []byte) string {
	out := make([]byte, nix32Len(len(b)))
	for i := range out {
		bit := i * 5
		c := uint(b[bit/8]) >> (bit % 8)
		if bit/8+1 < len(b) {
			c |= uint(b[bit/8+1]) << (8 - bit%8)
		}
		out[len(out)-1-i] = nix32Alphabet[c&0x1f]
	}
	return string(out)
}

// DecodeNix32 returns the bytes that s stands for. It refuses other characters
// and digits whose surplus bits are not zero, so that there is one spelling for
// any bytes.
func DecodeNix32(s string) ([]byte, error) {
	out := make([]byte, len(s)*5/8)
	if nix32Len(len(out)) != len(s) {
		return nil, errors.New("nix32 has no such length")
	}
	for i := range len(s) {
		v := nix32Values[s[len(s)-1-i]]
		if v == noNix32 {
			return nil, fmt.Errorf("%q is not a nix32 character", s[len(s)-1-i])
		}
		bit := i * 5
		c := uint(v) << (bit % 8)
		out[bit/8] |= byte(c)
		if bit/8+1 < len(out) {
			out[bit/8+1] |= byte(c >> 8)
		} else if c>>8 != 0 {
			return nil, errors.New("nix32 has surplus bits")
		}
	}
	return out, nil
}
