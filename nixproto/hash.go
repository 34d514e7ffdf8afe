package nixproto

// A HashAlgo is one of the hash algorithms of the Nix store.
type HashAlgo uint8

// The algorithms; the zero HashAlgo is none of them.
const (
	MD5 HashAlgo = iota + 1
	SHA1
	SHA256
	SHA512
)

// Size returns the length of a digest in bytes.
func (a HashAlgo) Size() int { return [...]int{0, 16, 20, 32, 64}[a] }

// A Hash is a digest with its algorithm. It is comparable; the zero Hash means
// absent.
type Hash struct {
	algo HashAlgo
	sum  [64]byte
}

const nix32Alphabet = "0123456789abcdfghijklmnpqrsvwxyz"

// nix32Value returns the value of one nix32 character, -1 if it is none.
func nix32Value(c byte) int {
	for i := range len(nix32Alphabet) {
		if nix32Alphabet[i] == c {
			return i
		}
	}
	return -1
}
