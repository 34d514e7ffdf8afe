package store

import (
	"encoding/hex"
	"fmt"

	"nbd/nixproto"
)

// A sum is the SHA-256 of a NAR, the name of its blob.
type sum [32]byte

func (h sum) String() string { return hex.EncodeToString(h[:]) }

// sumOf returns the name of the blob with that NAR hash.
func sumOf(h nixproto.Hash) (s sum, err error) {
	if h.Algo() != nixproto.SHA256 {
		return s, fmt.Errorf("%w NAR hash: not a SHA-256", ErrInvalid)
	}
	copy(s[:], h.Bytes())
	return s, nil
}

// hash returns h as a value of nixproto.
func (h sum) hash() nixproto.Hash { return nixproto.NewHash(nixproto.SHA256, h[:]) }
