package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"nbd/vm/egress"
)

// One request is up to maxTries attempts, each of which follows up to maxHops
// redirects. The credential goes to the scheme, host and port that it is for,
// and nowhere else.
const (
	maxTries = 3
	maxHops  = 8
	// backoff is waited before the second try; twice that before the third. A
	// server may ask for up to maxRetryAfter.
	backoff       = 250 * time.Millisecond
	maxRetryAfter = 5 * time.Second
)

// errUnreachable says that no answer came at all, or not in time.
var errUnreachable = errors.New("no answer")

// newTransport returns a transport that connects by the dialers given, or, with
// nil, anywhere. It uses no proxy: an environment is no setting of ours.
func newTransport(t timing, dialer func(host string) *net.Dialer) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			d := &net.Dialer{}
			if dialer != nil {
				host, _, err := net.SplitHostPort(address)
				if err != nil {
					return nil, err
				}
				d = dialer(host)
			}
			d.Timeout, d.KeepAlive = t.connect, 15*time.Second
			return d.DialContext(ctx, network, address)
		},
		ForceAttemptHTTP2:      true,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		TLSHandshakeTimeout:    t.connect,
		ResponseHeaderTimeout:  t.headers,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           64,
		MaxIdleConnsPerHost:    16,
		MaxConnsPerHost:        32,
		IdleConnTimeout:        time.Minute,
		DisableCompression:     true, // it would hide how much arrives
	}
}

// A site is a cache behind HTTP.
type site struct {
	c         *Client
	base      *url.URL
	auth      string // of the header Authorization; "" if none
	transport *http.Transport
}

// get implements getter.
func (s *site) get(ctx context.Context, ref string) (*body, error) {
	u, err := s.resolve(ref)
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		b, again, err := s.try(ctx, u)
		if err == nil || again < 0 || try == maxTries || ctx.Err() != nil {
			return b, err
		}
		if again > 0 {
			s.c.cfg.wait(ctx, again)
		} else {
			s.c.Backoff(ctx, try)
		}
	}
}

// resolve returns the URL that a reference of the cache means. As in Nix it is
// below the cache's own URL, unless it is an absolute one.
func (s *site) resolve(ref string) (*url.URL, error) {
	if !strings.HasPrefix(ref, "http://") && !strings.HasPrefix(ref, "https://") {
		ref = s.base.String() + "/" + strings.TrimLeft(ref, "/")
	}
	return target(ref, nil)
}

// target parses what a cache leads to.
func target(ref string, from *url.URL) (*url.URL, error) {
	u, err := url.Parse(ref)
	if err != nil || len(ref) > maxURL {
		return nil, fmt.Errorf("%w: it leads to what is no URL", ErrMalformed)
	}
	if from != nil {
		u = from.ResolveReference(u)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%w: it leads to neither http:// nor https://", ErrMalformed)
	}
	u.User, u.Fragment = nil, "" // a credential is ours to choose
	return u, nil
}

// try makes one attempt. again is how long to wait at least before another one;
// negative if that makes no sense.
func (s *site) try(ctx context.Context, u *url.URL) (b *body, again time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			cancel(nil)
		}
	}()
	auth := s.auth
	for range maxHops + 1 {
		if !sameOrigin(u, s.base) {
			auth = ""
		}
		resp, err := s.transport.RoundTrip(s.request(ctx, u, auth))
		if err != nil {
			again, err = unanswered(ctx, u, err)
			return nil, again, err
		}
		if resp.StatusCode == http.StatusOK {
			return newBody(resp, cancel, s.c.cfg.t.stall), 0, nil
		}
		drop(resp)
		if !isRedirect(resp.StatusCode) {
			again, err = refusedBy(u, resp)
			return nil, again, err
		}
		if u, err = target(resp.Header.Get("Location"), u); err != nil {
			return nil, -1, err
		}
	}
	return nil, -1, fmt.Errorf("%w: more than %d redirects, the last to %s", ErrMalformed, maxHops, shown(u))
}

func (s *site) request(ctx context.Context, u *url.URL, auth string) *http.Request {
	req := (&http.Request{
		Method: http.MethodGet, URL: u, Host: u.Host, Header: make(http.Header),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	req.Header.Set("User-Agent", s.c.cfg.UserAgent)
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	return req
}

func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(withPort(a), withPort(b))
}

// shown returns a URL for messages: parameters may hold a credential.
func shown(u *url.URL) string { return u.Scheme + "://" + u.Host + u.EscapedPath() }

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// drop reads a short rest of an answer, so that the connection can be used
// again.
func drop(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10) // an error closes the connection
	_ = resp.Body.Close()
}

// unanswered says what it means that no answer came.
func unanswered(ctx context.Context, u *url.URL, err error) (again time.Duration, _ error) {
	if ctx.Err() != nil {
		return -1, fmt.Errorf("%w: %w", errUnreachable, context.Cause(ctx))
	}
	var refused *egress.RefusedError
	if errors.As(err, &refused) {
		return -1, fmt.Errorf("%s: %w (%s)", shown(u), refused, refused.Hint())
	}
	told := fmt.Errorf("%w: %s: %w", errUnreachable, shown(u), withoutHost(err))
	var op *net.OpError
	var timeout net.Error
	if errors.As(err, &op) && op.Op == "dial" || errors.As(err, &timeout) && timeout.Timeout() {
		return -1, told // another try would take as long
	}
	return 0, told
}

// withoutHost is an error of a connection without what it says of this machine:
// its address, and its name server's.
func withoutHost(err error) error {
	var dns *net.DNSError
	var op *net.OpError
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("cannot resolve %s: %s", dns.Name, dns.Err)
	case errors.As(err, &op):
		return fmt.Errorf("%s: %w", op.Op, op.Err)
	}
	return err
}

// refusedBy says what a status means that is neither success nor redirect.
func refusedBy(u *url.URL, resp *http.Response) (again time.Duration, err error) {
	switch code := resp.StatusCode; code {
	case http.StatusNotFound, http.StatusGone, http.StatusForbidden: // S3 says 403 for what is not there
		return -1, fmt.Errorf("%s: %w (status %d)", shown(u), ErrNotFound, code)
	case http.StatusUnauthorized:
		return -1, fmt.Errorf("%s wants a credential (status 401); see access-tokens", shown(u))
	case http.StatusTooManyRequests, http.StatusRequestTimeout:
		again = retryAfter(resp)
	default:
		if again = -1; code >= 500 {
			again = retryAfter(resp)
		}
	}
	return again, fmt.Errorf("%s answers with status %d", shown(u), resp.StatusCode)
}

// retryAfter returns what a server asks to wait, within bounds.
func retryAfter(resp *http.Response) time.Duration {
	n, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16)
	if err != nil {
		return 0
	}
	return min(time.Duration(n)*time.Second, maxRetryAfter)
}

// Backoff waits before what broke off is tried again after that many tries, or
// until ctx ends.
func (c *Client) Backoff(ctx context.Context, tries int) {
	delay := backoff << min(max(tries-1, 0), 4)
	c.cfg.wait(ctx, delay/2+rand.N(delay))
}
