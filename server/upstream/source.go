package upstream

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"path"
	"strconv"
	"strings"

	"nbd/vm/egress"
)

// A Source names a binary cache, as an entry of `substituters` does.
type Source struct {
	// Operator says that the operator named it, and not an account.
	Operator bool
	// Rule is what is reached beside public addresses, if an account named it.
	Rule egress.Rule

	url      *url.URL // scheme, host and path, and nothing else
	auth     string   // the credential that the URL held; "" if none
	priority *int     // as given with ?priority=
}

// maxURL bounds the text of a URL, in bytes.
const maxURL = 2048

// ParseSource reads the URL of a binary cache:
// "https://[user:password@]host[:port][/path][?priority=N]", or
// "file:///path", which is the operator's alone. Other parameters of Nix's
// cache URLs are passed over. Errors do not quote a credential.
func ParseSource(s string, operator bool) (Source, error) {
	src, err := parseSource(s, operator)
	if err != nil {
		return Source{}, fmt.Errorf("cache %q: %w", hideCredential(s), err)
	}
	return src, nil
}

func parseSource(s string, operator bool) (Source, error) {
	if len(s) > maxURL {
		return Source{}, fmt.Errorf("its URL is longer than %d bytes", maxURL)
	}
	u, err := url.Parse(s)
	if err != nil {
		return Source{}, errors.New("it is no URL") // the error would quote it
	}
	src := Source{Operator: operator, url: &url.URL{Scheme: u.Scheme, Host: strings.ToLower(u.Host), Path: strings.TrimRight(u.Path, "/")}}
	switch {
	case u.Scheme == "file":
		err = checkFile(u, operator)
		src.url.Path = path.Clean(u.Path)
	case u.Scheme != "http" && u.Scheme != "https":
		err = errors.New("its URL begins with neither https:// nor http://")
	default:
		err = checkHost(u)
	}
	if err != nil {
		return Source{}, err
	}
	if u.User != nil {
		password, _ := u.User.Password()
		src.auth = basic(u.User.Username() + ":" + password)
	}
	if p := u.Query().Get("priority"); p != "" {
		n, err := strconv.ParseInt(p, 10, 32)
		if err != nil {
			return Source{}, errors.New("its priority is no number")
		}
		priority := int(n)
		src.priority = &priority
	}
	return src, nil
}

func checkFile(u *url.URL, operator bool) error {
	switch {
	case !operator:
		return errors.New("file:// is for the operator of this server alone")
	case u.Host != "" || !strings.HasPrefix(u.Path, "/") || u.User != nil:
		return errors.New("a folder is written file:///path")
	}
	return nil
}

func checkHost(u *url.URL) error {
	if u.Hostname() == "" || u.Opaque != "" {
		return errors.New("its URL has no host")
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return errors.New("its port is no port")
		}
	}
	return nil
}

// hideCredential returns a URL for messages.
func hideCredential(s string) string {
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		scheme, _, ok := strings.Cut(s[:i], "://")
		if !ok {
			return "…" + s[i:]
		}
		return scheme + "://…" + s[i:]
	}
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

// String returns the URL without its credential and parameters.
func (s Source) String() string { return s.url.String() }

// Tokens are credentials for caches, as in the setting `access-tokens`. The
// zero Tokens hold none.
type Tokens struct{ list []token }

type token struct{ place, auth string }

// Add adds a credential for a place: a host, with a port if it is for that
// alone, and maybe with the beginning of a path ("cache.example:8080/nix").
// "user:password" is sent as basic authentication, anything else as a bearer
// token. Errors do not quote what is secret.
func (t *Tokens) Add(place, secret string) error {
	if strings.ContainsFunc(secret, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("the access token for %.100q has control characters", place)
	}
	auth := "Bearer " + secret
	if strings.Contains(secret, ":") {
		auth = basic(secret)
	}
	host, path, _ := strings.Cut(place, "/")
	t.list = append(t.list, token{strings.TrimRight(strings.ToLower(host)+"/"+path, "/"), auth})
	return nil
}

// authorization returns the header's value for a cache's URL: the last one for
// the longest place that it is in; "" if there is none.
func (t Tokens) authorization(u *url.URL) string {
	auth, length := "", 0
	for _, e := range t.list {
		for _, at := range [...]string{withPort(u) + u.Path, u.Hostname() + u.Path} {
			if (at == e.place || strings.HasPrefix(at, e.place+"/")) && len(e.place) >= length {
				auth, length = e.auth, len(e.place)
			}
		}
	}
	return auth
}

// withPort returns host and port, also where the port is the scheme's.
func withPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	if u.Scheme == "https" {
		return u.Host + ":443"
	}
	return u.Host + ":80"
}

func basic(userPassword string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(userPassword))
}

// A cacheKey stands for a cache, how it may be reached, and the credential.
type cacheKey [sha256.Size]byte

func keyOf(src Source, auth string) cacheKey {
	rule := ""
	if !src.Operator {
		rule = src.Rule.ID()
	}
	return sha256.Sum256(fmt.Appendf(nil, "%t\x00%s\x00%s\x00%s", src.Operator, src.url, auth, rule))
}
