package adminapi

import (
	"context"
	"net/http"
	"net/url"
)

// Settings lists what counts for an owner: all, or the one that is named.
func (c *Client) Settings(ctx context.Context, o SettingsOwner, name string) (list []Setting, err error) {
	q := url.Values{"account": {o.Account}, "key": {o.Key}, "name": {name}}
	return list, c.do(ctx, http.MethodGet, "/settings", q, nil, &list)
}

// ChangeSetting changes a setting, and returns what counts then.
func (c *Client) ChangeSetting(ctx context.Context, change SettingChange) (s Setting, err error) {
	return s, c.do(ctx, http.MethodPost, "/settings", nil, change, &s)
}

// Link lets two accounts use what either has.
func (c *Client) Link(ctx context.Context, l Link) (done Link, err error) {
	return done, c.do(ctx, http.MethodPost, "/links", nil, l, &done)
}

// Unlink ends that.
func (c *Client) Unlink(ctx context.Context, l Link) (done Link, err error) {
	return done, c.do(ctx, http.MethodDelete, "/links", url.Values{"a": {l.A}, "b": {l.B}}, nil, &done)
}

// Tokens lists the tokens of an account, of all accounts if account is "".
func (c *Client) Tokens(ctx context.Context, account string) (list []TokenInfo, err error) {
	return list, c.do(ctx, http.MethodGet, "/tokens", url.Values{"account": {account}}, nil, &list)
}

// AddToken makes a token.
func (c *Client) AddToken(ctx context.Context, t NewToken) (added AddedToken, err error) {
	return added, c.do(ctx, http.MethodPost, "/tokens", nil, t, &added)
}

// RemoveToken ends a token and the connections that came with it.
func (c *Client) RemoveToken(ctx context.Context, account, name string) error {
	return c.do(ctx, http.MethodDelete, "/tokens", url.Values{"account": {account}, "name": {name}}, nil, nil)
}
