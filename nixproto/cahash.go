package nixproto

import (
	"errors"
	"fmt"
	"hash"
	"slices"

	"nbd/nixproto/nar"
)

// A CAHasher computes from an archive the hash that a content address of some
// method states. It is an io.Writer that takes exactly one archive. It is used
// by one goroutine at a time.
type CAHasher struct {
	method CAMethod
	algo   HashAlgo
	hash   hash.Hash   // of the archive, or of the contents of the file
	self   *SelfHasher // instead, if the object may refer to itself
	parser nar.Parser  // finds the contents of the file
}

// ErrUnverifiable says that nbd cannot compute a content address of some method.
var ErrUnverifiable = errors.New("content address cannot be verified")

// NewCAHasher returns a CAHasher. If self is not empty, the object has that path
// and refers to it; only CANAR allows that. Its error wraps ErrUnverifiable.
func NewCAHasher(m CAMethod, a HashAlgo, self StorePath) (*CAHasher, error) {
	switch {
	case m == CAText || m == CAFlat || m == CANAR && self == "":
		return &CAHasher{method: m, algo: a, hash: NewHasher(a)}, nil
	case m == CANAR:
		return &CAHasher{method: m, algo: a, self: NewSelfHasher(a, self)}, nil
	case m == CAGit:
		return nil, fmt.Errorf("%w: Git hashes are not supported", ErrUnverifiable)
	}
	return nil, fmt.Errorf("%w: unknown method", ErrUnverifiable)
}

// Write adds b to the archive. It fails if that is malformed, or does not have
// the one file that the method wants.
func (c *CAHasher) Write(b []byte) (int, error) {
	switch {
	case c.self != nil:
		return c.self.Write(b)
	case c.method == CANAR:
		return c.hash.Write(b)
	}
	start := c.parser.Size()
	n, err := c.parser.Feed(b)
	if err == nil && n < len(b) {
		err = errors.New("bytes after the archive")
	}
	if err == nil {
		err = c.addContents(b, start)
	}
	return n, err
}

// addContents hashes what of b, which begins at start, is contents of the file.
func (c *CAHasher) addContents(b []byte, start int64) error {
	x := c.parser.Index()
	if len(x) == 0 {
		return nil
	}
	if x[0].Kind != nar.Regular || x[0].Executable {
		return fmt.Errorf("%w: a flat or text content address is of a file that is not executable", ErrWrongCA)
	}
	from := max(x[0].Offset-start, 0)
	to := min(x[0].Offset+x[0].Size-start, int64(len(b)))
	if x[0].Offset > 0 && from < to {
		c.hash.Write(b[from:to])
	}
	return nil
}

// Check ends the archive. It returns an error that wraps ErrWrongCA if the
// content address of the archive is not ca, which has to be of the same method.
func (c *CAHasher) Check(ca ContentAddress) error {
	sum, legacy, err := c.sums()
	if err != nil {
		return err
	}
	if ca.Method != c.method || ca.Hash != sum && (ca.Hash != legacy || legacy.IsZero()) {
		return fmt.Errorf("%w: it is %q, not %q", ErrWrongCA, ContentAddress{c.method, sum}, ca)
	}
	return nil
}

// Sum ends the archive and returns its content address. One with references to
// itself is computed as by Nix 2.26 and newer.
func (c *CAHasher) Sum() (ContentAddress, error) {
	sum, _, err := c.sums()
	if err != nil {
		return ContentAddress{}, err
	}
	return ContentAddress{c.method, sum}, nil
}

// LegacySum ends the archive and returns its content address as Nix before 2.17
// computed it, which differs only for an object that refers to itself. There is
// none for one that does so more than a million times.
func (c *CAHasher) LegacySum() (ContentAddress, error) {
	sum, legacy, err := c.sums()
	if err != nil || c.self == nil {
		return ContentAddress{c.method, sum}, err
	}
	if legacy.IsZero() {
		return ContentAddress{}, errors.New("it refers to itself too often")
	}
	return ContentAddress{c.method, legacy}, nil
}

func (c *CAHasher) sums() (sum, legacy Hash, err error) {
	if c.self != nil {
		sum, legacy = c.self.Sums()
		return sum, legacy, nil
	}
	if c.method != CANAR {
		if err := c.parser.Close(); err != nil {
			return Hash{}, Hash{}, err
		}
	}
	return HashFromSum(c.algo, c.hash), Hash{}, nil
}

// CAHasherFor returns the CAHasher to write the archive of info to, and the
// content address to Check then. h is nil if CheckCA has said all there is to
// say: info has no content address, or one that is the NAR hash.
func CAHasherFor(info *PathInfo) (h *CAHasher, ca ContentAddress, err error) {
	ca, err = ParseContentAddress(info.CA)
	if err != nil || ca.Method == 0 {
		return nil, ca, err
	}
	var self StorePath
	if slices.Contains(info.References, info.Path) {
		self = info.Path
	}
	if ca.Method == CANAR && ca.Hash.Algo() == SHA256 && self == "" {
		return nil, ca, nil
	}
	h, err = NewCAHasher(ca.Method, ca.Hash.Algo(), self)
	return h, ca, err
}
