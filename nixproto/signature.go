package nixproto

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// ErrBadSignature says that a signature claims to be by a key and is not.
var ErrBadSignature = errors.New("signature does not verify")

// A SigningKey is a named Ed25519 key, as nix-store --generate-binary-cache-key
// makes. The zero SigningKey signs nothing.
type SigningKey struct {
	Name string
	key  ed25519.PrivateKey
}

// A PublicKey verifies what the SigningKey of the same name signed. It is
// comparable.
type PublicKey struct {
	Name string
	key  [ed25519.PublicKeySize]byte
}

// GenerateSigningKey returns a new key of that name, with randomness from rand.
func GenerateSigningKey(name string, rand io.Reader) (SigningKey, error) {
	if err := checkKeyName(name); err != nil {
		return SigningKey{}, err
	}
	seed := make([]byte, ed25519.SeedSize)
	if _, err := io.ReadFull(rand, seed); err != nil {
		return SigningKey{}, fmt.Errorf("generate signing key: %w", err)
	}
	return SigningKey{name, ed25519.NewKeyFromSeed(seed)}, nil
}

// ParseSigningKey reads the text of a secret key file,
// "<name>:<base64 of seed and public key>". Its errors do not quote the key.
func ParseSigningKey(s string) (SigningKey, error) {
	name, raw, err := parseKey(s, ed25519.PrivateKeySize)
	if err != nil {
		return SigningKey{}, fmt.Errorf("parse signing key: %w", err)
	}
	key := ed25519.NewKeyFromSeed(raw[:ed25519.SeedSize])
	if !slices.Equal(key, ed25519.PrivateKey(raw)) {
		return SigningKey{}, errors.New("parse signing key: its halves do not belong together")
	}
	return SigningKey{name, key}, nil
}

// Secret returns the text of the secret key file.
func (k SigningKey) Secret() string { return k.Name + ":" + base64.StdEncoding.EncodeToString(k.key) }

// String hides the key: logs get its name only.
func (k SigningKey) String() string { return k.Name + ":(secret)" }

// GoString hides the key from %#v.
func (k SigningKey) GoString() string { return "nixproto.SigningKey{" + k.String() + "}" }

// Public returns the public half.
func (k SigningKey) Public() PublicKey {
	p := PublicKey{Name: k.Name}
	copy(p.key[:], k.key[ed25519.SeedSize:])
	return p
}

// Sign returns a signature of the fingerprint, "<name>:<base64>".
func (k SigningKey) Sign(fingerprint string) string {
	return k.Name + ":" + base64.StdEncoding.EncodeToString(ed25519.Sign(k.key, []byte(fingerprint)))
}

// ParsePublicKey reads "<name>:<base64>", as in trusted-public-keys.
func ParsePublicKey(s string) (PublicKey, error) {
	name, raw, err := parseKey(s, ed25519.PublicKeySize)
	if err != nil {
		return PublicKey{}, fmt.Errorf("parse public key %q: %w", clip(s), err)
	}
	p := PublicKey{Name: name}
	copy(p.key[:], raw)
	return p, nil
}

// String returns the form that ParsePublicKey reads.
func (p PublicKey) String() string { return p.Name + ":" + base64.StdEncoding.EncodeToString(p.key[:]) }

// Verify reports whether sig, "<name>:<base64>", is p's signature of the
// fingerprint. A signature by a key of another name is not.
func (p PublicKey) Verify(fingerprint, sig string) bool {
	name, raw, err := ParseSignature(sig)
	return err == nil && name == p.Name && ed25519.Verify(p.key[:], []byte(fingerprint), raw)
}

// ParseSignature reads "<name>:<base64>" and returns the name of the key and
// the 64 bytes of the signature.
func ParseSignature(s string) (name string, sig []byte, err error) {
	if name, sig, err = parseKey(s, ed25519.SignatureSize); err != nil {
		return "", nil, fmt.Errorf("parse signature %q: %w", clip(s), err)
	}
	return name, sig, nil
}

// parseKey reads a name and so many bytes.
func parseKey(s string, size int) (name string, raw []byte, err error) {
	name, text, ok := strings.Cut(s, ":")
	if !ok {
		return "", nil, errors.New("no colon")
	}
	if err := checkKeyName(name); err != nil {
		return "", nil, err
	}
	if len(text) != base64.StdEncoding.EncodedLen(size) {
		return "", nil, fmt.Errorf("not the base64 of %d bytes", size)
	}
	raw, err = base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != size {
		return "", nil, fmt.Errorf("not the base64 of %d bytes", size)
	}
	return name, raw, nil
}

// checkKeyName wants what can stand in a narinfo and in a list of keys.
func checkKeyName(name string) error {
	if name == "" {
		return errors.New("name of a key is empty")
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c == ':' || c == 0x7f {
			return errors.New("name of a key has a colon, blank or control character")
		}
	}
	return nil
}

// Fingerprint returns what signatures of the path sign:
// "1;<path>;sha256:<nix32>;<size>;<reference>,…" (Nix's
// ValidPathInfo::fingerprint).
func (p *PathInfo) Fingerprint() string {
	var b strings.Builder
	b.WriteString("1;")
	b.WriteString(string(p.Path))
	b.WriteByte(';')
	b.WriteString(p.NarHash.String())
	b.WriteByte(';')
	b.WriteString(strconv.FormatUint(p.NarSize, 10))
	sep := byte(';')
	for _, r := range slices.Sorted(slices.Values(p.References)) {
		b.WriteByte(sep)
		b.WriteString(string(r))
		sep = ','
	}
	if sep == ';' {
		b.WriteByte(sep)
	}
	return b.String()
}

// Sign adds a signature by k, unless it is there.
func (p *PathInfo) Sign(k SigningKey) {
	if sig := k.Sign(p.Fingerprint()); !slices.Contains(p.Signatures, sig) {
		p.Signatures = append(p.Signatures, sig)
	}
}

// CheckSignatures returns the keys among trusted that signed p. A signature
// with the name of a trusted key that is not by any trusted key of that name is
// an error that wraps ErrBadSignature; other signatures are passed over.
func (p *PathInfo) CheckSignatures(trusted []PublicKey) ([]PublicKey, error) {
	signers, err := checkSignatures(p.Fingerprint(), p.Signatures, trusted)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Path, err)
	}
	return signers, nil
}

// CheckSignatures is PathInfo.CheckSignatures for a realisation.
func (r Realisation) CheckSignatures(trusted []PublicKey) ([]PublicKey, error) {
	signers, err := checkSignatures(r.Fingerprint(), r.Signatures, trusted)
	if err != nil {
		return nil, fmt.Errorf("realisation %s: %w", r.ID(), err)
	}
	return signers, nil
}

func checkSignatures(fingerprint string, sigs []string, trusted []PublicKey) (signers []PublicKey, err error) {
	for _, sig := range sigs {
		name, _, _ := strings.Cut(sig, ":")
		known := false
		verified := slices.IndexFunc(trusted, func(k PublicKey) bool {
			known = known || k.Name == name
			return k.Name == name && k.Verify(fingerprint, sig)
		})
		switch {
		case verified >= 0 && !slices.Contains(signers, trusted[verified]):
			signers = append(signers, trusted[verified])
		case verified < 0 && known:
			return nil, fmt.Errorf("%w: it names the key %q", ErrBadSignature, clip(name))
		}
	}
	return signers, nil
}
