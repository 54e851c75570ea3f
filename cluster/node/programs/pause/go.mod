module bits-to-pods/node/pause

go 1.26.0
