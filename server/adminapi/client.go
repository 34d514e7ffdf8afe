// Package adminapi is what `nbd admin` and a running server say to each other:
// JSON over HTTP on a local socket (types.go), and the client's side of it. The
// server's side is in package server.
package adminapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"nbd/store"
	"nbd/vm"
)

// A HintError is an error with the way out beside it.
type HintError struct {
	Err  error
	Hint string
}

func (e *HintError) Error() string { return e.Err.Error() }

// Unwrap returns the error without the hint.
func (e *HintError) Unwrap() error { return e.Err }

// A Client asks a running server through its socket. Errors of its
// methods are *HintError where there is something to advise.
type Client struct {
	http  http.Client
	state string
}

// NewClient returns a client for the server of a state directory. It does
// not connect yet.
func NewClient(stateDir string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(stateDir, Socket))
	}
	return &Client{http: http.Client{Transport: &http.Transport{DialContext: dial}}, state: stateDir}
}

// Status tells how the server does.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, http.MethodGet, "/status", nil, nil, &s)
}

// Accounts lists all accounts with their keys.
func (c *Client) Accounts(ctx context.Context) (list []AccountInfo, err error) {
	return list, c.do(ctx, http.MethodGet, "/accounts", nil, nil, &list)
}

// AddAccount makes an account; its keys are lines as in authorized_keys.
func (c *Client) AddAccount(ctx context.Context, req NewKeys) (a AccountInfo, err error) {
	return a, c.do(ctx, http.MethodPost, "/accounts", nil, req, &a)
}

// RemoveAccount removes an account with its keys and its view.
func (c *Client) RemoveAccount(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/accounts", url.Values{"name": {name}}, nil, nil)
}

// Keys lists the keys of an account, of all accounts if account is "".
func (c *Client) Keys(ctx context.Context, account string) (list []KeyInfo, err error) {
	return list, c.do(ctx, http.MethodGet, "/keys", url.Values{"account": {account}}, nil, &list)
}

// AddKeys adds keys to an account.
func (c *Client) AddKeys(ctx context.Context, req NewKeys) (list []KeyInfo, err error) {
	return list, c.do(ctx, http.MethodPost, "/keys", nil, req, &list)
}

// RemoveKey removes the key with a fingerprint.
func (c *Client) RemoveKey(ctx context.Context, fingerprint string) error {
	return c.do(ctx, http.MethodDelete, "/keys", url.Values{"fingerprint": {fingerprint}}, nil, nil)
}

// Check proves the store, with all its bytes if readData.
func (c *Client) Check(ctx context.Context, readData bool) (r store.Report, err error) {
	return r, c.do(ctx, http.MethodPost, "/check", url.Values{"readData": {fmt.Sprint(readData)}}, nil, &r)
}

// GC removes the bytes that no account has any more.
func (c *Client) GC(ctx context.Context) (f Freed, err error) {
	return f, c.do(ctx, http.MethodPost, "/gc", nil, nil, &f)
}

// do sends one request and decodes its answer into out, unless that is nil.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, in, out any) error {
	answer, err := c.ask(ctx, method, path, query, in)
	if err != nil {
		return err
	}
	defer answer.Close()
	if out == nil {
		return nil
	}
	return json.NewDecoder(answer).Decode(out)
}

// ask sends one request, with in as JSON unless that is nil, and returns the
// answer, which the caller closes. A refusal is an error.
func (c *Client) ask(ctx context.Context, method, path string, query url.Values, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "nbd", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	var e Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, MaxBody)).Decode(&e); err != nil {
		return nil, fmt.Errorf("server answered %s", resp.Status)
	}
	return nil, &HintError{&e, e.Hint}
}

// explain says what to do about a socket that does not answer.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ECONNREFUSED):
		return &HintError{fmt.Errorf("no server runs on %s", c.state),
			"start it with `nbd serve`, or name its state directory with --state"}
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF):
		return &HintError{fmt.Errorf("the server on %s does not accept this user", c.state),
			"run `nbd admin` as the user that runs `nbd serve`, or as root"}
	}
	return err
}

// Print writes the status for a person; w aligns columns at tabs.
func (s *Status) Print(w io.Writer) {
	fmt.Fprintf(w, "nbd %s\tprocess %d, since %s\n", s.Version, s.PID, s.Started.Format(time.DateTime))
	fmt.Fprintf(w, "state\t%s\n", s.State)
	fmt.Fprintf(w, "ssh\t%s, %d sessions\n", s.SSH, s.Sessions)
	fmt.Fprintf(w, "offers\t%s; %s\n", strings.Join(s.Systems, " "), strings.Join(s.Features, " "))
	fmt.Fprintf(w, "builds\t%d running, %d waiting; room for %d guests, %d MiB, %d CPUs\n",
		s.Queue.Running, s.Queue.Waiting, s.Queue.Total.Guests, s.Queue.Total.MemoryMiB, s.Queue.Total.CPUs)
	printGuests(w, &s.Guests)
	printLacks(w, &s.Guests)
	fmt.Fprintf(w, "store\t%d accounts, %d paths, %d NARs, %d MiB; %d MiB free\n",
		s.Store.Accounts, s.Store.Paths, s.Store.Blobs, s.Store.Bytes>>20, s.Store.FreeDisk>>20)
}

func printGuests(w io.Writer, g *vm.Status) {
	accel := g.Accel
	switch accel {
	case "":
		accel = "not known before the first boot"
	case "tcg":
		accel = "tcg (EMULATION, slow): " + g.WhyNotKVM
	}
	fmt.Fprintf(w, "accelerator\t%s\n", accel)
	fmt.Fprintf(w, "guests\t%d alive, %d templates; kernel %s, QEMU %s\n", g.Guests, g.Templates, g.Kernel, g.QEMU)
	for _, weak := range g.Weaknesses {
		fmt.Fprintf(w, "weaker\t%s\n", weak)
	}
}

// printLacks tells what is not offered, and why.
func printLacks(w io.Writer, g *vm.Status) {
	for _, s := range g.Systems {
		if !s.Offered {
			fmt.Fprintf(w, "not offered\t%s: %s\n", s.Name, s.WhyNot)
		}
	}
	for _, f := range g.Features {
		if !f.Offered {
			fmt.Fprintf(w, "not offered\t%s: %s\n", f.Name, f.WhyNot)
		}
	}
}

// ReadKeyFiles returns the lines with keys of files as ssh-keygen makes them;
// "-" is standard input.
func ReadKeyFiles(files []string) ([]string, error) {
	if len(files) == 0 {
		return nil, &HintError{errors.New("no SSH key given"), "name a file with --ssh-key, like ~/.ssh/id_ed25519.pub"}
	}
	var keys []string
	for _, name := range files {
		b, err := readFileOrStdin(name)
		if err != nil {
			return nil, fmt.Errorf("read SSH key: %w", err)
		}
		before := len(keys)
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				keys = append(keys, line)
			}
		}
		if len(keys) == before {
			return nil, fmt.Errorf("%s has no key in it", name)
		}
	}
	return keys, nil
}

func readFileOrStdin(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(os.Stdin, MaxBody))
	}
	return os.ReadFile(name)
}
