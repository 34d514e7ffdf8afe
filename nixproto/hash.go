package nixproto

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
)

// A HashAlgo is one of the hash algorithms of the Nix store.
type HashAlgo uint8

// The algorithms; the zero HashAlgo is none of them.
const (
	MD5 HashAlgo = iota + 1
	SHA1
	SHA256
	SHA512
)

var (
	algoNames = [...]string{"", "md5", "sha1", "sha256", "sha512"}
	algoSizes = [...]int{0, md5.Size, sha1.Size, sha256.Size, sha512.Size}
)

// ParseHashAlgo returns the algorithm of that name.
func ParseHashAlgo(name string) (HashAlgo, error) {
	for a := MD5; a <= SHA512; a++ {
		if algoNames[a] == name {
			return a, nil
		}
	}
	return 0, fmt.Errorf("unknown hash algorithm %q", clip(name))
}

// String returns the algorithm's name as in content addresses: "sha256".
func (a HashAlgo) String() string {
	if int(a) >= len(algoNames) {
		return fmt.Sprintf("nixproto.HashAlgo(%d)", uint8(a))
	}
	return algoNames[a]
}

// Size returns the length of a digest in bytes; 0 for no known algorithm.
func (a HashAlgo) Size() int {
	if int(a) >= len(algoSizes) {
		return 0
	}
	return algoSizes[a]
}

// NewHasher returns a hash that computes digests of algorithm a, which must be
// one of the constants above.
func NewHasher(a HashAlgo) hash.Hash {
	switch a {
	case MD5:
		return md5.New()
	case SHA1:
		return sha1.New()
	case SHA256:
		return sha256.New()
	case SHA512:
		return sha512.New()
	}
	panic("nixproto: NewHasher of " + a.String())
}

// A Hash is a digest with its algorithm. It is comparable; the zero Hash means
// absent.
type Hash struct {
	algo HashAlgo
	sum  [64]byte
}

// NewHash returns the Hash with the given digest, which must have the
// algorithm's length.
func NewHash(a HashAlgo, sum []byte) Hash {
	if len(sum) != a.Size() {
		panic(fmt.Sprintf("nixproto: NewHash of %v with %d bytes", a, len(sum)))
	}
	h := Hash{algo: a}
	copy(h.sum[:], sum)
	return h
}

// SumSHA256 returns the SHA-256 of b.
func SumSHA256(b []byte) Hash {
	sum := sha256.Sum256(b)
	return NewHash(SHA256, sum[:])
}

// HashFromSum returns what h, a hash of algorithm a, has computed.
func HashFromSum(a HashAlgo, h hash.Hash) Hash { return NewHash(a, h.Sum(nil)) }

// Algo returns the algorithm; 0 for the zero Hash.
func (h Hash) Algo() HashAlgo { return h.algo }

// IsZero reports whether h is absent.
func (h Hash) IsZero() bool { return h.algo == 0 }

// Bytes returns a copy of the digest.
func (h Hash) Bytes() []byte { return append([]byte(nil), h.sum[:h.algo.Size()]...) }

// Base16 returns the digest in lower-case hexadecimal, without the algorithm.
func (h Hash) Base16() string { return hex.EncodeToString(h.sum[:h.algo.Size()]) }

// Base32 returns the digest in nix32, without the algorithm.
func (h Hash) Base32() string { return EncodeNix32(h.sum[:h.algo.Size()]) }

// Base64 returns the digest in standard base64, without the algorithm.
func (h Hash) Base64() string { return base64.StdEncoding.EncodeToString(h.sum[:h.algo.Size()]) }

// SRI returns "<algorithm>-<base64>", the form of the web's subresource
// integrity; "" for the zero Hash.
func (h Hash) SRI() string {
	if h.IsZero() {
		return ""
	}
	return h.algo.String() + "-" + h.Base64()
}

// String returns "<algorithm>:<nix32>", the form of narinfo and of content
// addresses; "" for the zero Hash.
func (h Hash) String() string {
	if h.IsZero() {
		return ""
	}
	return h.algo.String() + ":" + h.Base32()
}

// MarshalText implements encoding.TextMarshaler with String.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler: empty text is the zero
// Hash, other text is read by ParseHash and must name its algorithm.
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*h = Hash{}
		return nil
	}
	parsed, err := ParseHash(0, string(text))
	if err == nil {
		*h = parsed
	}
	return err
}

// ParseHash reads a hash in any of Nix's spellings: hexadecimal, nix32 or
// base64, alone or after "<algorithm>:", or base64 after "<algorithm>-". What
// names no algorithm is of algorithm a, and what names one must agree with a,
// unless a is 0. The length tells the spellings apart.
func ParseHash(a HashAlgo, s string) (Hash, error) {
	h, err := parseHash(a, s)
	if err != nil {
		return Hash{}, fmt.Errorf("parse hash %q: %w", clip(s), err)
	}
	return h, nil
}

func parseHash(a HashAlgo, s string) (Hash, error) {
	digest := s
	sep := strings.IndexAny(s, ":-") // neither is in the alphabet of a digest
	if sep >= 0 {
		named, err := ParseHashAlgo(s[:sep])
		if err != nil {
			return Hash{}, err
		}
		if a != 0 && a != named {
			return Hash{}, fmt.Errorf("not a %v", a)
		}
		a, digest = named, s[sep+1:]
	}
	if a.Size() == 0 {
		return Hash{}, errors.New("no algorithm")
	}
	sri := sep >= 0 && s[sep] == '-'
	sum, err := decodeDigest(digest, a.Size(), sri)
	if err != nil {
		return Hash{}, err
	}
	return NewHash(a, sum), nil
}

// decodeDigest reads a digest of size bytes.
func decodeDigest(s string, size int, sri bool) (sum []byte, err error) {
	switch {
	case len(s) == base64.StdEncoding.EncodedLen(size):
		sum, err = base64.StdEncoding.Strict().DecodeString(s)
	case sri:
		err = errors.New("not base64 of the right length")
	case len(s) == hex.EncodedLen(size):
		sum, err = hex.DecodeString(s)
	case len(s) == nix32Len(size):
		sum, err = DecodeNix32(s)
	default:
		err = fmt.Errorf("no spelling of %d bytes has %d characters", size, len(s))
	}
	if err == nil && len(sum) != size { // base64 takes padding and line ends for characters
		err = fmt.Errorf("%d bytes instead of %d", len(sum), size)
	}
	return sum, err
}

// Fold shortens a digest to size bytes, as Nix does for store paths
// (compressHash): byte i is XORed into byte i mod size of the result.
func Fold(sum []byte, size int) []byte {
	folded := make([]byte, size)
	for i, c := range sum {
		folded[i%size] ^= c
	}
	return folded
}
