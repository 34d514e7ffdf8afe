package builtin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

// How downloads are tried again, as by Nix.
const (
	tries           = 5
	retryTime       = 250 * time.Millisecond // doubled with each try
	retryTimeBusy   = time.Minute            // where a server says that it is asked too often
	maxRedirects    = 10
	stalledDownload = 5 * time.Minute
	// connectTime is longer than Nix's 15 s: in an emulated guest shaking hands
	// takes its time.
	connectTime = time.Minute
)

// maxErrorBody bounds what is kept of a page that explains an error, in bytes.
const maxErrorBody = 64 << 10

// userAgent is what servers are told.
const userAgent = "nbd (builtin:fetchurl)"

// A fetcher downloads.
type fetcher struct {
	log    *logger
	client *http.Client
	// noCA is why no certificate can be checked; nil if they can.
	noCA error
	// wait returns after a time, or with the context's error.
	wait func(context.Context, time.Duration) error
}

// newFetcher returns a fetcher that trusts the certificates in a file. Nothing
// else of its surroundings counts, no proxy either.
func newFetcher(log *logger, caFile string) *fetcher {
	f := &fetcher{log: log, wait: wait}
	roots := x509.NewCertPool()
	if pem, err := os.ReadFile(caFile); err != nil {
		f.noCA = err
	} else if !roots.AppendCertsFromPEM(pem) {
		f.noCA = fmt.Errorf("%s has no certificate", caFile)
	}
	f.client = &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: connectTime}).DialContext,
			TLSClientConfig:     &tls.Config{RootCAs: roots},
			TLSHandshakeTimeout: connectTime,
			ForceAttemptHTTP2:   true,
		},
		CheckRedirect: func(q *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return permanent{fmt.Errorf("more than %d redirects", maxRedirects)}
			}
			if q.URL.Scheme != "http" && q.URL.Scheme != "https" {
				return errUnsupported
			}
			return nil
		},
	}
	return f
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// A permanent error is not tried again.
type permanent struct{ error }

// Unwrap returns what the error is.
func (p permanent) Unwrap() error { return p.error }

// errUnsupported says that a URL is of no kind that can be fetched.
var errUnsupported = permanent{errors.New("Unsupported protocol")}

// A statusError is an answer that is none of a success.
type statusError struct {
	code int
	body string // of the page that came with it
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("HTTP error %s%d%s", magenta, e.code, plain)
	if e.body != "" && (len(e.body) < 1024 || strings.Contains(e.body, "<html>")) {
		text += "\n\nresponse body:\n\n" + strings.TrimRight(e.body, "\n")
	}
	return text
}

// isHopeless reports whether the same request would only get the same answer.
func isHopeless(err error) bool {
	var status *statusError
	if errors.As(err, &status) {
		switch c := status.code; {
		case c == http.StatusRequestTimeout, c == http.StatusTooManyRequests:
			return false
		default:
			return c >= 400 && c < 500 || c == http.StatusNotImplemented ||
				c == http.StatusHTTPVersionNotSupported || c == http.StatusNetworkAuthenticationRequired
		}
	}
	var forever permanent
	var untrusted *tls.CertificateVerificationError
	return errors.As(err, &forever) || errors.As(err, &untrusted)
}

// A transfer is one download with all its tries.
type transfer struct {
	f     *fetcher
	url   *url.URL
	w     io.Writer
	taken int64 // bytes written to w
	// ranges says that the server can go on where it stopped.
	ranges bool
}

// download writes what is at a URL to w.
func (f *fetcher) download(ctx context.Context, link string, w io.Writer) error {
	u, err := parseURL(link)
	if err != nil {
		return err
	}
	t := &transfer{f: f, url: u, w: w}
	for try := 1; ; try++ {
		err := t.once(ctx)
		if err == nil {
			return nil
		}
		failure := fmt.Errorf("unable to download '%s%s%s': %w", magenta, link, plain, withoutURL(err))
		if try == tries || isHopeless(err) || t.taken > 0 && !t.ranges || ctx.Err() != nil {
			return failure
		}
		if err := t.again(ctx, failure, try); err != nil {
			return err
		}
	}
}

// again waits before the next try, and says so.
func (t *transfer) again(ctx context.Context, failure error, try int) error {
	first := retryTime
	var status *statusError
	if errors.As(failure, &status) && status.code == http.StatusTooManyRequests {
		first = retryTimeBusy
	}
	d := time.Duration(float64(first) * math.Pow(2, float64(try-1)+rand.Float64()/2)).Truncate(time.Millisecond)
	from := ""
	if t.taken > 0 {
		from = fmt.Sprintf(" from offset %d", t.taken)
	}
	if err := t.f.log.warn("%v; retrying%s in %d ms (attempt %d/%d)", failure, from, d.Milliseconds(), try, tries); err != nil {
		return err
	}
	return t.f.wait(ctx, d)
}

// withoutURL returns an error without what net/http says of the request, which
// the caller says in its own way.
func withoutURL(err error) error {
	var about *url.Error
	if errors.As(err, &about) {
		return about.Err
	}
	return err
}

// once tries once.
func (t *transfer) once(ctx context.Context) error {
	switch t.url.Scheme {
	case "file":
		return t.file()
	case "https":
		if t.f.noCA != nil {
			return permanent{errors.New("this server has no certificates of authorities, so nobody can be trusted by https")}
		}
	case "http":
	default:
		return errUnsupported
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(stalledDownload, func() { cancel(errors.New("Timeout was reached")) })
	defer stalled.Stop()
	r, err := t.request(ctx)
	if err == nil {
		err = t.receive(r, func() { stalled.Reset(stalledDownload) })
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// request asks for what is missing.
func (t *transfer) request(ctx context.Context) (*http.Response, error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url.String(), nil)
	if err != nil {
		return nil, permanent{err}
	}
	q.Header.Set("User-Agent", userAgent)
	if t.taken > 0 {
		q.Header.Set("Range", fmt.Sprintf("bytes=%d-", t.taken))
		q.Header.Set("Accept-Encoding", "identity")
	}
	return t.f.client.Do(q)
}

// receive writes the body of an answer.
func (t *transfer) receive(r *http.Response, progress func()) error {
	defer r.Body.Close() // only read from
	if !slices.Contains([]int{200, 201, 204, 206, 304}, r.StatusCode) {
		// What could not be read of it is missing in the message.
		body, _ := io.ReadAll(io.LimitReader(r.Body, maxErrorBody))
		return &statusError{r.StatusCode, string(body)}
	}
	if t.taken > 0 && !strings.HasPrefix(r.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", t.taken)) {
		return permanent{errors.New("HTTP server doesn't seem to support byte ranges. Cannot resume.")}
	}
	// What was asked for as gzip is unpacked already, and says nothing here.
	if c := r.Header.Get("Content-Encoding"); c != "" && !strings.EqualFold(c, "identity") {
		return permanent{fmt.Errorf("the server sends it packed by '%s', which was not asked for", c)}
	}
	t.ranges = strings.EqualFold(r.Header.Get("Accept-Ranges"), "bytes") && !r.Uncompressed
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			progress()
			if _, err := t.w.Write(buf[:n]); err != nil {
				return permanent{errors.New(reason(err))}
			}
			t.taken += int64(n)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// file copies a file of the sandbox.
func (t *transfer) file() error {
	f, err := os.Open(t.url.Path)
	if err != nil {
		return permanent{fmt.Errorf("Could not open file %s: %s", t.url.Path, reason(err))}
	}
	defer f.Close() // only read from
	if _, err := io.Copy(t.w, f); err != nil {
		return permanent{errors.New(reason(err))}
	}
	return nil
}
