package nixproto

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A CAMethod says what of an object its content address is the hash of.
type CAMethod uint8

// The methods; the zero CAMethod is none of them.
const (
	// CAText is the contents of a file that may have references, and none to
	// itself: derivations and builtins.toFile. Always SHA-256.
	CAText CAMethod = iota + 1
	// CAFlat is the contents of a file without references.
	CAFlat
	// CANAR is the archive of the object; with SHA-256 it may have references.
	CANAR
	// CAGit is the object's Git tree or blob hash. nbd reads and passes on such
	// addresses, and does not verify them.
	CAGit
)

// prefix returns the method as it precedes the algorithm in derivations.
func (m CAMethod) prefix() string {
	return [...]string{"", "text:", "", "r:", "git:"}[m]
}

// A ContentAddress is the "ca" of a valid path: a hash of the object, from
// which its store path follows. It is comparable; the zero ContentAddress means
// that the path has none.
type ContentAddress struct {
	Method CAMethod
	Hash   Hash
}

// ErrWrongCA says that a path does not follow from its content address, or the
// content address not from the contents.
var ErrWrongCA = errors.New("content address does not match")

// ParseContentAddress reads a content address as in narinfo and on the wire:
// "text:sha256:<hash>", "fixed:<hash>", "fixed:r:<hash>" or "fixed:git:<hash>",
// where <hash> is "<algorithm>:" and a digest. "" is the zero ContentAddress.
func ParseContentAddress(s string) (ContentAddress, error) {
	if s == "" {
		return ContentAddress{}, nil
	}
	ca, err := parseContentAddress(s)
	if err != nil {
		return ContentAddress{}, fmt.Errorf("parse content address %q: %w", clip(s), err)
	}
	return ca, nil
}

func parseContentAddress(s string) (ca ContentAddress, err error) {
	end := strings.LastIndexByte(s, ':')
	if end < 0 {
		return ca, errors.New("no colon")
	}
	var algo HashAlgo
	if ca.Method, algo, err = ParseCAMethod(s[:end]); err != nil {
		return ca, err
	}
	ca.Hash, err = ParseHash(algo, s[end+1:])
	return ca, err
}

// String returns the form that ParseContentAddress reads, the digest in nix32.
func (ca ContentAddress) String() string {
	switch ca.Method {
	case 0:
		return ""
	case CAText:
		return "text:" + ca.Hash.String()
	default:
		return "fixed:" + ca.Method.prefix() + ca.Hash.String()
	}
}

// ParseCAMethod reads the method and algorithm of an AddToStore request:
// "text:sha256", "fixed:sha256", "fixed:r:sha256", "fixed:git:sha1".
func ParseCAMethod(s string) (CAMethod, HashAlgo, error) {
	if fixed, ok := strings.CutPrefix(s, "fixed:"); ok {
		m, a, err := parseOutputMethod(fixed)
		if m != CAText {
			return m, a, err
		}
	} else if strings.HasPrefix(s, "text:") {
		return parseOutputMethod(s)
	}
	return 0, 0, fmt.Errorf("unknown content address method %q", clip(s))
}

// parseOutputMethod reads the method and algorithm of a derivation's output:
// "sha256", "r:sha256", "text:sha256", "git:sha1".
func parseOutputMethod(s string) (m CAMethod, a HashAlgo, err error) {
	m = CAFlat
	if i := strings.IndexByte(s, ':'); i >= 0 {
		switch s[:i+1] {
		case CAText.prefix():
			m = CAText
		case CANAR.prefix():
			m = CANAR
		case CAGit.prefix():
			m = CAGit
		default:
			return 0, 0, fmt.Errorf("unknown content address method %q", clip(s))
		}
		s = s[i+1:]
	}
	if a, err = ParseHashAlgo(s); err != nil {
		return 0, 0, err
	}
	switch {
	case m == CAText && a != SHA256:
		return 0, 0, fmt.Errorf("a text's content address cannot be %v", a)
	case m == CAGit && a != SHA1 && a != SHA256:
		return 0, 0, fmt.Errorf("a Git content address cannot be %v", a)
	}
	return m, a, nil
}

// makeStorePath returns the path of an object of some type and inner hash
// (Nix's makeStorePath; "Complete Store Path Calculation" in its manual).
func makeStorePath(typ string, inner Hash, name string) (StorePath, error) {
	if err := CheckName(name); err != nil {
		return "", fmt.Errorf("make store path: %w", err)
	}
	fingerprint := typ + ":" + inner.Algo().String() + ":" + inner.Base16() + ":" + StoreDir + ":" + name
	sum := sha256.Sum256([]byte(fingerprint))
	return StorePath(StoreDir + "/" + EncodeNix32(Fold(sum[:], 20)) + "-" + name), nil
}

// MakeTextPath returns the path of a text with that SHA-256: a derivation or
// what builtins.toFile makes. References need no order.
func MakeTextPath(name string, content Hash, refs []StorePath) (StorePath, error) {
	return ContentAddress{CAText, content}.Path(name, refs, false)
}

// MakeFixedOutputPath returns the path of an object with that hash. Only CANAR
// with SHA-256 can have references (which need no order, and are without the
// path itself) or refer to itself.
func MakeFixedOutputPath(method CAMethod, hash Hash, name string, refs []StorePath, self bool) (StorePath, error) {
	return ContentAddress{method, hash}.Path(name, refs, self)
}

// Path returns the path of the object with content address ca: see MakeTextPath
// and MakeFixedOutputPath.
func (ca ContentAddress) Path(name string, refs []StorePath, self bool) (StorePath, error) {
	switch {
	case ca.Method == 0 || ca.Hash.IsZero():
		return "", errors.New("make store path: no content address")
	case ca.Method == CAText:
		if ca.Hash.Algo() != SHA256 || self {
			return "", fmt.Errorf("make store path: text with a %v, or referring to itself", ca.Hash.Algo())
		}
		return makeStorePath(withRefs("text", refs, false), ca.Hash, name)
	case ca.Method == CANAR && ca.Hash.Algo() == SHA256:
		return makeStorePath(withRefs("source", refs, self), ca.Hash, name)
	case len(refs) > 0 || self:
		return "", fmt.Errorf("make store path: %q cannot have references", ca)
	}
	inner := "fixed:out:" + ca.Method.prefix() + ca.Hash.Algo().String() + ":" + ca.Hash.Base16() + ":"
	return makeStorePath("output:out", SumSHA256([]byte(inner)), name)
}

// withRefs returns the type of an object with references.
func withRefs(typ string, refs []StorePath, self bool) string {
	var b strings.Builder
	b.WriteString(typ)
	for _, r := range slices.Compact(slices.Sorted(slices.Values(refs))) {
		b.WriteByte(':')
		b.WriteString(string(r))
	}
	if self {
		b.WriteString(":self")
	}
	return b.String()
}

// CheckCA recomputes the path of info from its content address, and returns an
// error that wraps ErrWrongCA if it is another one. It also compares the
// content address with the NAR hash where the two are the same; otherwise that
// the contents have that address is CAHasher's part. A path without content
// address is right.
func CheckCA(info *PathInfo) error {
	ca, err := ParseContentAddress(info.CA)
	if err != nil || ca == (ContentAddress{}) {
		return err
	}
	self := slices.Contains(info.References, info.Path)
	refs := slices.DeleteFunc(slices.Clone(info.References), func(r StorePath) bool { return r == info.Path })
	path, err := ca.Path(info.Path.Name(), refs, self)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrWrongCA, info.Path, err)
	}
	if path != info.Path {
		return fmt.Errorf("%w: %s has the content address %q of %s", ErrWrongCA, info.Path, ca, path)
	}
	if ca.Method == CANAR && ca.Hash.Algo() == SHA256 && !self && ca.Hash != info.NarHash {
		return fmt.Errorf("%w: %s has NAR hash %v and content address %q", ErrWrongCA, info.Path, info.NarHash, ca)
	}
	return nil
}
