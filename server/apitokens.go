package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"nbd/store"
)

// tokenCommands are about tokens.
func tokenCommands() []apiCommand {
	return []apiCommand{
		{name: "tokens create", args: "[NAME]", need: AccountWrite, run: createToken, text: textOf(printNewToken),
			help: "make a token and print it, once and never again",
			flags: []apiFlag{
				{"--name", "N", "its name, if NAME is not given; else one is made up"},
				{"--permissions", "P,…", "what it may do (default: default-permissions)"},
				{"--read-only", "", "of the permissions, only those to read"},
				{"--ttl", "TIME", "when it expires, such as 90s, 1h or 30d (default: never)"},
				{"--ttl-seconds", "N", "the same in seconds"},
			}},
		{name: "tokens list", need: AccountRead, run: listTokens, help: "list the tokens",
			text: listText("", "no tokens", printToken)},
		{name: "tokens revoke", args: "NAME", need: AccountWrite, run: revokeToken, text: textOf(printToken),
			complete: completeToken, help: "end a token, and the sessions that came with it"},
	}
}

// An apiToken is a token without its secret.
type apiToken struct {
	Name        string   `json:"name"`
	Permissions []string `json:"permissions"`
	Created     apiTime  `json:"created"`
	Expires     *apiTime `json:"expires"` // null for never
	Expired     bool     `json:"expired"`
}

func newAPIToken(t store.Token, now time.Time) apiToken {
	if t.Permissions == nil {
		t.Permissions = []string{}
	}
	return apiToken{t.Name, t.Permissions, apiTime{t.Created}, optTime(t.Expires), !t.Expires.IsZero() && !now.Before(t.Expires)}
}

// An apiNewToken is a token with its secret.
type apiNewToken struct {
	Token string `json:"token"`
	apiToken
}

func createToken(ctx context.Context, c *apiCall) (any, error) {
	t := store.Token{}
	var err error
	if t.Name, err = c.tokenName(); err != nil {
		return nil, err
	}
	now := time.Now()
	ttl, err := c.tokenLife()
	if err != nil {
		return nil, err
	}
	if ttl > 0 {
		t.Expires = now.Add(ttl)
	}
	if t.Permissions, err = c.permissions(); err != nil {
		return nil, err
	}
	if err := c.makeRoomForToken(ctx, now); err != nil {
		return nil, err
	}
	if c.has("--read-only") {
		t.Permissions = readOnly(t.Permissions)
	}
	secret, t, err := c.server.store.AddToken(ctx, c.account(), t)
	if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrInvalid) {
		return nil, refusef("%v", err)
	} else if err != nil {
		return nil, err
	}
	return apiNewToken{secret, newAPIToken(t, now)}, nil
}

// keepExpired is how long a token is listed after it expired.
const keepExpired = 24 * time.Hour

// makeRoomForToken forgets tokens that expired a while ago, and bounds the
// others.
func (c *apiCall) makeRoomForToken(ctx context.Context, now time.Time) error {
	tokens, err := c.server.store.Tokens(ctx, c.account())
	if err != nil {
		return err
	}
	n := 0
	for _, t := range tokens {
		if t.Expires.IsZero() || now.Before(t.Expires.Add(keepExpired)) {
			n++
			continue
		}
		if _, err := c.server.store.RemoveToken(ctx, c.account(), t.Name); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	if n >= maxKeys {
		return refusef("the account has %d tokens; revoke some of them", n)
	}
	return nil
}

// readOnly returns those of permissions that let read.
func readOnly(permissions []string) []string {
	list := []string{}
	for _, p := range permissions {
		if strings.HasSuffix(p, ":read") {
			list = append(list, p)
		}
	}
	return list
}

// tokenName is the name for a new token.
func (c *apiCall) tokenName() (string, error) {
	name, ok := c.flag("--name")
	switch {
	case ok && len(c.args) > 0:
		return "", usagef("give the name once")
	case len(c.args) > 0:
		name = c.args[0]
	case !ok:
		var random [6]byte
		if _, err := rand.Read(random[:]); err != nil {
			return "", fmt.Errorf("name token: %w", err)
		}
		return "token-" + hex.EncodeToString(random[:]), nil
	}
	if err := store.CheckTokenName(name); err != nil {
		return "", usagef("%v", err)
	}
	return name, nil
}

// maxTokenLife bounds how long a token lives, if it has a bound at all.
const maxTokenLife = 100 * 365 * 24 * time.Hour

// tokenLife is how long a new token lives; 0 for ever.
func (c *apiCall) tokenLife() (time.Duration, error) {
	if v, ok := c.flag("--ttl-seconds"); ok {
		if c.has("--ttl") {
			return 0, usagef("give one of --ttl and --ttl-seconds")
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n <= 0 || n > int64(maxTokenLife/time.Second) {
			return 0, usagef("--ttl-seconds %q is no number of seconds", clip(v))
		}
		return time.Duration(n) * time.Second, nil
	}
	v, ok := c.flag("--ttl")
	if !ok {
		return 0, nil
	}
	d, err := parseLife(v)
	if err != nil || d <= 0 || d > maxTokenLife {
		return 0, usagef("--ttl %q is no time; write it like 90s, 1h or 30d", clip(v))
	}
	return d, nil
}

// parseLife reads a time as Go does, and days, which it does not have.
func parseLife(v string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(v, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * 24 * time.Hour, err
	}
	return time.ParseDuration(v)
}

// printNewToken prints the secret alone, for scripts.
func printNewToken(w io.Writer, t apiNewToken) error {
	_, err := io.WriteString(w, t.Token+"\n")
	return err
}

func listTokens(ctx context.Context, c *apiCall) (any, error) {
	tokens, err := c.server.store.Tokens(ctx, c.account())
	if err != nil {
		return nil, err
	}
	list := make([]apiToken, len(tokens))
	for i, t := range tokens {
		list[i] = newAPIToken(t, time.Now())
	}
	return seqOf(list), nil
}

func printToken(w io.Writer, t apiToken) error {
	expires := "never expires"
	switch {
	case t.Expired:
		expires = "expired " + t.Expires.String()
	case t.Expires != nil:
		expires = "expires " + t.Expires.String()
	}
	_, err := fmt.Fprintf(w, "%-24s %s  %s\n", t.Name, joined(t.Permissions), expires)
	return err
}

func revokeToken(ctx context.Context, c *apiCall) (any, error) {
	if c.args[0] == c.Client.TokenName {
		return nil, refusef("this session came with the token %s: revoke it from another one", clip(c.args[0]))
	}
	t, err := c.server.store.RemoveToken(ctx, c.account(), c.args[0])
	if errors.Is(err, store.ErrNotFound) {
		return nil, notFoundf("there is no token %q", clip(c.args[0]))
	} else if err != nil {
		return nil, err
	}
	c.Log.Info("token revoked", "token", t.Name)
	c.server.Disconnect(func(client *Client) bool { return client.Token == t.ID })
	return newAPIToken(t, time.Now()), nil
}

// completeToken completes the name of a token.
func completeToken(ctx context.Context, c *apiCall, _ []string) (names []string) {
	tokens, err := c.server.store.Tokens(ctx, c.account())
	if err != nil {
		return nil
	}
	for _, t := range tokens {
		names = append(names, t.Name)
	}
	return names
}
