package settings

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/vm/egress"
)

// Values as text: numbers in decimal, sizes with K, M, G or T behind them for
// powers of 1024 as in Nix, lists with commas or spaces. The texts of errors
// follow the name of a setting or variable ("is "x", and should be …").

// Bounds of what is accepted.
const (
	// MaxText is the longest text of one value, in bytes.
	MaxText = 16 << 10
	// maxItems is how many items a list has at most.
	maxItems = 100
	// maxSeconds is the longest limit: it fits a Duration.
	maxSeconds = 1 << 32
)

// should is the error of a text that is not what it should be.
func should(text, be string) error { return fmt.Errorf("is %q, and should be %s", clip(text), be) }

// clip keeps long texts out of messages.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func parseBool(text string) (bool, error) {
	switch text {
	case "true", "1":
		return true, nil
	case "false", "0", "":
		return false, nil
	}
	return false, should(text, "true or false")
}

// parseCount returns a parser for numbers of a thing up to a maximum.
func parseCount(things string, most int) func(string) (int, error) {
	return func(text string) (int, error) {
		n, err := strconv.ParseInt(text, 10, 64)
		if errors.Is(err, strconv.ErrRange) && !strings.HasPrefix(text, "-") {
			return most, nil
		}
		if err != nil || n < 0 {
			return 0, should(text, "a number of "+things)
		}
		return int(min(n, int64(most))), nil
	}
}

func parseSeconds(text string) (time.Duration, error) {
	n, err := parseCount("seconds", maxSeconds)(text)
	return time.Duration(n) * time.Second, err
}

func parseBytes(text string) (int64, error) {
	digits, shift := text, 0
	if text != "" {
		if i := strings.IndexByte("KMGT", text[len(text)-1]); i >= 0 {
			digits, shift = text[:len(text)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if errors.Is(err, strconv.ErrRange) && !strings.HasPrefix(digits, "-") {
		return math.MaxInt64, nil
	}
	if err != nil || n < 0 {
		return 0, should(text, "a number of bytes")
	}
	if n > math.MaxInt64>>shift {
		return math.MaxInt64, nil
	}
	return n << shift, nil
}

func parseHours(text string) (*float64, error) {
	h, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(h) || math.IsInf(h, 0) || h < 0 || strings.ContainsAny(text, "xXpP_") {
		return nil, should(text, "a number of hours")
	}
	return &h, nil
}

// A Reuse says whose results may stand in for a build.
type Reuse string

// The values of reuse-results.
const (
	ReuseAll  Reuse = "all"
	ReuseOwn  Reuse = "own"
	ReuseNone Reuse = "none"
)

func parseReuse(text string) (Reuse, error) {
	switch r := Reuse(text); r {
	case ReuseAll, ReuseOwn, ReuseNone:
		return r, nil
	}
	return "", should(text, "all, own or none")
}

// Items splits the text of a list.
func Items(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
}

// parseList returns a parser for lists of what parse reads. A list keeps its
// order and has nothing twice.
func parseList[T any](parse func(string) (T, error)) func(string) ([]T, error) {
	return func(text string) ([]T, error) {
		if len(text) > MaxText {
			return nil, fmt.Errorf("is longer than %d bytes", MaxText)
		}
		items := Items(text)
		if len(items) > maxItems {
			return nil, fmt.Errorf("has %d items, and should have at most %d", len(items), maxItems)
		}
		var list []T
		for i, item := range items {
			if slices.Contains(items[:i], item) {
				continue
			}
			v, err := parse(item)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, nil
	}
}

func parsePublicKey(text string) (nixproto.PublicKey, error) {
	k, err := nixproto.ParsePublicKey(text)
	if err != nil {
		return k, should(text, "public keys like cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=")
	}
	return k, nil
}

// parseKeyName reads the name of a signing key.
func parseKeyName(text string) (string, error) {
	if text == "" || len(text) > 255 || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r == ':' || r == ',' || r > '~' }) {
		return "", should(text, "the name of a key, like cache.nixos.org-1")
	}
	return text, nil
}

// parseOffer reads the name of a key or a public key.
func parseOffer(text string) (string, error) {
	if strings.Contains(text, ":") {
		k, err := parsePublicKey(text)
		if err != nil {
			return "", err
		}
		return k.String(), nil
	}
	return parseKeyName(text)
}

func parseAccountName(text string) (string, error) {
	word := func(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' }
	if text == "" || len(text) > 64 || !word(rune(text[0])) ||
		strings.ContainsFunc(text, func(r rune) bool { return !word(r) && !strings.ContainsRune("._-", r) }) {
		return "", should(text, "names of accounts")
	}
	return text, nil
}

// Permissions are all that a key or token can have; they are spelled as store's.
var Permissions = []string{"build:read", "build:write", "store:read", "store:write", "account:read", "account:write"}

func parsePermission(text string) (string, error) {
	if !slices.Contains(Permissions, text) {
		return "", should(text, "permissions out of "+strings.Join(Permissions, ", "))
	}
	return text, nil
}

// ParsePermissions reads a list of permissions.
func ParsePermissions(text string) ([]string, error) { return parseList(parsePermission)(text) }

// parseAddresses reads what is reached.
func parseAddresses(text string) (string, error) {
	if _, err := egress.ParseRule([]string{text}); err != nil {
		return "", should(text, "networks (CIDR), addresses, host[:port]")
	}
	return text, nil
}

// A URL is the address of a cache. It may hold secrets: what prints it shows
// them as dots.
type URL struct{ raw string }

// schemes of caches.
const (
	schemesRead  = "http https file"
	schemesWrite = "http https s3 file"
)

// parseURL returns a parser for addresses with one of the schemes.
func parseURL(schemes string) func(string) (URL, error) {
	be := "URLs with one of the schemes " + schemes
	return func(text string) (URL, error) {
		u, err := url.Parse(text)
		if err != nil || !slices.Contains(strings.Fields(schemes), u.Scheme) {
			return URL{}, fmt.Errorf("is not what it should be: %s", be) // without the text, which may hold secrets
		}
		if (u.Host == "") != (u.Scheme == "file") || u.Scheme == "file" && !strings.HasPrefix(u.Path, "/") || u.Opaque != "" {
			return URL{}, fmt.Errorf("is not what it should be: a URL has a host, or is file:// and a path")
		}
		return URL{text}, nil
	}
}

// Raw returns the address with its secrets.
func (u URL) Raw() string { return u.raw }

// Parse returns the parts of the address with its secrets; it is not shared.
func (u URL) Parse() *url.URL {
	v, err := url.Parse(u.raw)
	if err != nil {
		return &url.URL{} // not one that parseURL made
	}
	return v
}

// Local reports whether the address is a path of the host.
func (u URL) Local() bool { return strings.HasPrefix(u.raw, "file:") }

// String returns the address without its secrets.
func (u URL) String() string {
	v := u.Parse()
	if _, ok := v.User.Password(); ok {
		v.User = url.UserPassword(v.User.Username(), hidden)
	}
	query := strings.Split(v.RawQuery, "&")
	for i, part := range query {
		if name, _, ok := strings.Cut(part, "="); ok && isSecret(name) {
			query[i] = name + "=" + hidden
		}
	}
	v.RawQuery = strings.Join(query, "&")
	return v.String()
}

// hidden stands for a secret.
const hidden = "..."

// isSecret reports whether a parameter of that name may hold a secret.
func isSecret(name string) bool {
	name = strings.ToLower(name)
	for _, word := range []string{"secret", "token", "key", "password", "credential", "signature"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}

// An AccessToken is a credential for the caches of one host.
type AccessToken struct {
	// Host is the host, with the port if the token is for that alone, and may
	// have the beginning of a path behind it.
	Host string
	// Token is a bearer token, or "user:password". See Secret.
	Token Secret
}

// A Secret is text that is not shown when it is printed.
type Secret string

// String returns dots.
func (s Secret) String() string { return hidden }

// GoString returns dots, too.
func (s Secret) GoString() string { return hidden }

// MarshalText returns dots, too.
func (s Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Reveal returns the secret.
func (s Secret) Reveal() string { return string(s) }

// parseAccessToken reads "host=token".
func parseAccessToken(text string) (AccessToken, error) {
	host, token, ok := strings.Cut(text, "=")
	if !ok || host == "" || token == "" || strings.Contains(host, "@") || strings.Contains(host, "://") {
		return AccessToken{}, errors.New("is not what it should be: HOST=TOKEN, or HOST=USER:PASSWORD") // without the text
	}
	return AccessToken{Host: host, Token: Secret(token)}, nil
}

// An OIDCSubject is a pattern of identity tokens that may be exchanged for one of
// the account.
type OIDCSubject struct {
	Issuer   string // URL
	Audience string
	Subject  string // * stands for any text
}

const oidcForm = "issuer=https://…;audience=…;subject=…"

// parseOIDCSubject reads "issuer=…;audience=…;subject=…".
func parseOIDCSubject(text string) (o OIDCSubject, err error) {
	for part := range strings.SplitSeq(text, ";") {
		name, value, _ := strings.Cut(part, "=")
		field, ok := map[string]*string{"issuer": &o.Issuer, "audience": &o.Audience, "subject": &o.Subject}[name]
		if !ok || value == "" || *field != "" {
			return OIDCSubject{}, should(text, oidcForm)
		}
		*field = value
	}
	u, err := url.Parse(o.Issuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || o.Audience == "" || strings.Trim(o.Subject, "*") == "" {
		return OIDCSubject{}, should(text, oidcForm+", with more than * as subject")
	}
	return o, nil
}

// String returns the form that is set.
func (o OIDCSubject) String() string {
	return "issuer=" + o.Issuer + ";audience=" + o.Audience + ";subject=" + o.Subject
}
